// The API from C++: owners that close what they opened, errors as exceptions.
//
//     make && build/embed_cpp build/models/stories.q3n "Once upon a time" [TEMPERATURE]
//
// C++ includes the header for its API alone; the implementation is C and comes from an object
// file that was compiled with -DQ3N_IMPLEMENTATION (or from libqwen3next).
#include "../qwen3next.h"

#include <cstdlib>
#include <exception>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Closer {
    void operator()(q3n_model *m) const { q3n_model_close(m); }
    void operator()(q3n_session *s) const { q3n_session_destroy(s); }
};
template <typename T> using Owner = std::unique_ptr<T, Closer>;

void check(q3n_result r, const char *detail = nullptr)
{
    if (r != Q3N_OK) throw std::runtime_error(detail && *detail ? detail : q3n_result_string(r));
}

Owner<q3n_model> open_model(const std::string &path)
{
    q3n_model *m = nullptr;
    q3n_error err = q3n_error();
    check(q3n_model_open(&m, path.c_str(), nullptr, &err), err.message);
    return Owner<q3n_model>(m);
}

// A session that chooses tokens itself.
Owner<q3n_session> create_session(const q3n_model &m, int capacity, float temperature)
{
    q3n_session_options o = Q3N_INIT(q3n_session_options);
    o.capacity = capacity;
    q3n_session *s = nullptr;
    q3n_error err = q3n_error();
    check(q3n_session_create(&s, &m, &o, &err), err.message);
    Owner<q3n_session> session(s);
    q3n_sampler_options sampling = Q3N_INIT(q3n_sampler_options);
    sampling.temperature = temperature;
    sampling.top_p = 0.95f;
    sampling.seed = 1;
    check(q3n_session_set_sampler(s, &sampling), q3n_session_error(s)->message);
    return session;
}

std::vector<int32_t> tokenize(const q3n_model &m, const std::string &text)
{
    // No more tokens than bytes, and the prefix: up to 16 ids.
    std::vector<int32_t> ids(text.size() + 16);
    size_t n = 0;
    check(q3n_tokenize(&m, text.data(), text.size(), Q3N_TOKENIZE_PREFIX, ids.data(),
                       ids.size(), &n));
    ids.resize(n);
    return ids;
}

void tell(const std::string &path, const std::string &prompt, float temperature)
{
    const Owner<q3n_model> model = open_model(path);
    const Owner<q3n_session> session = create_session(*model, 1024, temperature);

    const std::vector<int32_t> ids = tokenize(*model, prompt);
    std::vector<float> logits(static_cast<size_t>(q3n_model_vocab_size(model.get())));
    q3n_detokenizer decoder = q3n_detokenizer();
    decoder.skip_special = 1;
    char text[1024];
    size_t n = 0;
    int32_t id = 0;
    check(q3n_session_eval(session.get(), ids.data(), static_cast<int>(ids.size()),
                           logits.data()), q3n_session_error(session.get())->message);
    q3n_sampler *sampler = q3n_session_sampler(session.get());
    check(q3n_sampler_sample(sampler, logits.data(), &id), q3n_sampler_error(sampler)->message);
    for (int i = 0, n_chosen = 0; i < 200 && !q3n_model_is_eos(model.get(), id); i++) {
        check(q3n_detokenizer_next(&decoder, model.get(), id, text, sizeof text, &n));
        std::cout.write(text, static_cast<std::streamsize>(n)).flush();
        check(q3n_session_decode(session.get(), id, &id, 1, &n_chosen),
              q3n_session_error(session.get())->message);
    }
    q3n_detokenizer_finish(&decoder, text, &n);
    std::cout.write(text, static_cast<std::streamsize>(n)) << '\n';
}

}

int main(int argc, char **argv)
{
    if (argc < 3) {
        std::cerr << "usage: embed_cpp MODEL.q3n PROMPT [TEMPERATURE]\n";
        return 2;
    }
    try {
        tell(argv[1], argv[2], argc > 3 ? static_cast<float>(std::atof(argv[3])) : 0.8f);
    } catch (const std::exception &e) {
        std::cerr << "embed_cpp: " << e.what() << '\n';
        return 1;
    }
    return 0;
}
