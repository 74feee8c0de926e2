# qwen3next.h: command line, examples, shared library, tests.  `make help` lists the targets.
#
#   make [config=release|debug|sanitize|thread|scalar|coverage] [CC=clang] [CFLAGS=...] [TARGET]
#
# The release is built in build/, every other configuration in build/<config>/.  Yours: CC, CXX,
# CPPFLAGS, CFLAGS, CXXFLAGS, LDFLAGS (they come last, so they win), PYTHON, and where to install:
# DESTDIR, PREFIX, BINDIR, LIBDIR, INCLUDEDIR, DATADIR, DOCDIR, MANDIR (see "Installing").

config ?= release
B      := $(if $(filter release,$(config)),build,build/$(config))

# ---- Flags ----
WARNINGS := -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wundef
C_FLAGS   = -std=c11 $(WARNINGS) -Wstrict-prototypes -Wmissing-prototypes
CXX_FLAGS = -std=c++11 $(WARNINGS)
MODE_FLAGS.release  := -O2
MODE_FLAGS.debug    := -O0 -g
# Chunks of 0: what a chat template makes lies in allocations of its own, which ASan sees.
MODE_FLAGS.sanitize := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -DQ3N__CHUNK=0 \
                       -fno-sanitize-recover=all
MODE_FLAGS.thread   := -O1 -g1 -fsanitize=thread
MODE_FLAGS.scalar   := -O2 -DQ3N_NO_SIMD
MODE_FLAGS.coverage := -O0 -g --coverage
# Not optimised: where undefined behaviour is looked for, clang 14 takes over ten minutes for the
# kernels' inlined bodies at -O1, at -O0 twelve seconds.
MODE_FLAGS.fuzz     := -O0 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
                       -DQ3N__CHUNK=0
MODE_FLAGS.aarch64  := -O2
MODE_FLAGS.windows  := -O1 -D__USE_MINGW_ANSI_STDIO=1
MODE_FLAGS := $(MODE_FLAGS.$(config))
ifeq ($(MODE_FLAGS),)
  $(error config=$(config): choose release, debug, sanitize, thread, scalar or coverage)
endif
MODE_FLAGS += -ffp-contract=off

COMPILE_C   = $(CC) $(C_FLAGS) $(MODE_FLAGS) -MMD -MP $(CPPFLAGS) $(CFLAGS)
COMPILE_CXX = $(CXX) $(CXX_FLAGS) $(MODE_FLAGS) -MMD -MP $(CPPFLAGS) $(CXXFLAGS)
LIBRARIES   = -lm -lpthread
CMOCKA      = -lcmocka
RUN         =

AARCH64 := build/aarch64
ifeq ($(config),aarch64)
  override CC := aarch64-linux-gnu-gcc
  AR      := aarch64-linux-gnu-ar
  SYSROOT := $(CURDIR)/$(AARCH64)/sysroot/usr
  CMOCKA  := -isystem $(SYSROOT)/include -L$(SYSROOT)/lib/aarch64-linux-gnu -lcmocka \
             -Wl,-rpath,$(SYSROOT)/lib/aarch64-linux-gnu
  RUN     := qemu-aarch64 -L /usr/aarch64-linux-gnu
  export TEST_CPU_SECONDS := 7200
endif
WINDOWS := build/windows
ifeq ($(config),windows)
  override CC := x86_64-w64-mingw32-gcc
  AR := x86_64-w64-mingw32-ar
  # Its printf attribute knows the old runtime only.
  TEST_FLAGS := -include tests/windows/posix.h -Itests/windows -isystem $(WINDOWS)/cmocka \
                -Wno-format -Wno-format-extra-args
  CMOCKA     := $(WINDOWS)/cmocka/cmocka.o
  LIBRARIES  := -static -lm -lpthread
  RUN        := env WINEDEBUG=-all WINEPREFIX=$(CURDIR)/$(WINDOWS)/wine wine
endif
ifeq ($(config),fuzz)
  override CC := clang
endif
WASM := build/wasm

# ---- Names of the libraries ----
#
# The shared library's name carries what changes when programs must be compiled again: Q3N_ABI.  In
# build/ the file has the name that is linked; make install adds the version.
VERSION := $(shell sed -n 's/^\#define Q3N_VERSION_[MP][A-Z]* *\([0-9]*\)$$/\1/p' qwen3next.h)
VERSION := $(subst $() ,.,$(VERSION))
ABI     := $(shell sed -n 's/^\#define Q3N_ABI  *\([0-9]*\).*/\1/p' qwen3next.h)
MACHINE := $(shell $(CC) -dumpmachine 2>/dev/null)
STATIC  := libqwen3next.a
EXPORT  := __attribute__((visibility("default")))
ifneq ($(findstring darwin,$(MACHINE)),)
  SHARED       := libqwen3next.dylib
  SHARED_NAME  := libqwen3next.$(ABI).dylib
  SHARED_FILE  := libqwen3next.$(VERSION).dylib
  SHARED_FLAGS  = -Wl,-install_name,$(LIBDIR)/$(SHARED_NAME) -Wl,-current_version,$(VERSION)
else ifneq ($(findstring mingw,$(MACHINE)),)
  SHARED       := qwen3next.dll
  IMPORTS      := libqwen3next.dll.a
  SHARED_FLAGS  = -Wl,--out-implib,$(B)/$(IMPORTS)
  EXPORT       := __declspec(dllexport)
  EXE          := .exe
else
  SHARED       := libqwen3next.so
  SHARED_NAME  := libqwen3next.so.$(ABI)
  SHARED_FILE  := libqwen3next.so.$(VERSION)
  SHARED_FLAGS  = -Wl,-soname,$(SHARED_NAME) -Wl,--version-script,tools/qwen3next.map
endif

# ---- What is made of what ----
# library.c is the implementation, of both headers.
LIBRARY       := examples/q3n/library.c
CLI_SOURCES   := $(filter-out $(LIBRARY),$(wildcard examples/q3n/*.c))
CLI_OBJECTS   := $(CLI_SOURCES:examples/q3n/%.c=$(B)/obj/q3n/%.o) $(B)/obj/qwen3next.o
C_TESTS       := $(patsubst tests/test_%.c,%,$(wildcard tests/test_*.c))
# The longest begin first.
LONG_TESTS    := model schedules speculate session loader kernels sampler
C_TESTS       := $(filter $(LONG_TESTS),$(C_TESTS)) $(filter-out $(LONG_TESTS),$(C_TESTS))
FUZZ_TARGETS  := $(patsubst tests/fuzz_%.c,%,$(wildcard tests/fuzz_*.c))
PYTHON_TESTS  := $(patsubst tests/test_%.py,%,$(wildcard tests/test_*.py))
# Tests that start threads and are short: these run under the thread sanitizer too.
THREAD_TESTS  := $(filter chat parallel public memory quantize storage session schedules,$(C_TESTS))
HF_GOLDENS    := $(patsubst tests/golden/%/config.json,%,$(wildcard tests/golden/*/config.json))
KERAS_GOLDENS := $(patsubst tests/golden/keras/%.keras,%,$(wildcard tests/golden/keras/*.keras))
STORIES       := build/models/stories.q3n
TOKENIZER     := build/models/tokenizer_qwen3.q3n
MODELS        := $(patsubst %,build/models/%.q3n,$(HF_GOLDENS) $(KERAS_GOLDENS)) \
                 $(STORIES) $(TOKENIZER)
PROGRAMS      := $(B)/q3n $(B)/$(SHARED) $(B)/$(STATIC) $(B)/embed
# For other machines there is a C compiler alone.
ifeq ($(filter aarch64 windows,$(config)),)
  PROGRAMS    += $(B)/embed_cpp
endif

# Without -j on the command line every CPU is used.
ifeq ($(MAKELEVEL),0)
  MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 2)
endif
SUBMAKE = $(MAKE) --no-print-directory

# The first Python that has numpy and h5py, looked for when a recipe first needs it.
PYTHON ?= python3
FIND_PYTHON = for p in $(PYTHON) /usr/bin/python3 build/venv/bin/python; do \
    "$$p" -c 'import numpy, h5py' > /dev/null 2>&1 && { echo "$$p"; exit; }; done; echo $(PYTHON)
PY = $(eval PY := $(shell $(FIND_PYTHON)))$(PY)

.DELETE_ON_ERROR:
# Test programs are made by pattern rules only: they stay for the next run.
.SECONDARY:
.SUFFIXES:
DEPS := deps deps-aarch64 deps-windows deps-wasm
.PHONY: all help $(DEPS) demo test test-aarch64 test-windows test-wasm stress fuzz bench
.PHONY: bench-sessions lint coverage models mutate compile-cost install uninstall clean
.PHONY: suites suite-inputs always list-suites

# ---- deps together with other targets: those start afresh when everything is installed ----
LATER := $(filter-out $(DEPS),$(MAKECMDGOALS))
ifneq ($(filter $(DEPS),$(MAKECMDGOALS)),)

$(firstword $(LATER)): $(filter $(DEPS),$(MAKECMDGOALS))
	+@$(SUBMAKE) $(LATER)
$(wordlist 2,99,$(LATER)): $(firstword $(LATER)) ; @:

else

all: $(PROGRAMS)   ## Build the command line q3n, the shared library and the examples (default)

# ---- Programs ----

# Holds the command lines: when they change, everything is made again.  On macOS they name LIBDIR.
COMMANDS = $(COMPILE_C) $(COMPILE_CXX) $(LDFLAGS) $(SHARED_FLAGS)
$(B)/flags: always
	@mkdir -p $(@D)
	@printf '%s\n' '$(COMMANDS)' | cmp -s - $@ || printf '%s\n' '$(COMMANDS)' > $@

$(B)/obj/q3n/%.o: examples/q3n/%.c $(B)/flags
	@mkdir -p $(@D)
	$(COMPILE_C) -c $< -o $@

# The implementation as an object: all hidden but the API.
$(B)/obj/qwen3next.o: $(LIBRARY) $(B)/flags
	@mkdir -p $(@D)
	$(COMPILE_C) -fPIC -fvisibility=hidden '-DQ3N_DEF=$(EXPORT)' -c $< -o $@

$(B)/q3n: $(CLI_OBJECTS)
	$(CC) $(MODE_FLAGS) $(CFLAGS) $(LDFLAGS) $^ $(LIBRARIES) -o $@

$(B)/$(SHARED): $(B)/obj/qwen3next.o tools/qwen3next.map
	$(CC) -shared $(MODE_FLAGS) $(SHARED_FLAGS) $(CFLAGS) $(LDFLAGS) $< $(LIBRARIES) -o $@
	$(if $(SHARED_NAME),ln -sf $(SHARED) $(B)/$(SHARED_NAME))

$(B)/$(STATIC): $(B)/obj/qwen3next.o
	@rm -f $@
	$(AR) rcs $@ $^

$(B)/embed: examples/embed.c $(B)/flags
	@mkdir -p $(@D) $(B)/obj
	$(COMPILE_C) -MF $(B)/obj/embed.d $< $(LDFLAGS) $(LIBRARIES) -o $@

$(B)/embed_cpp: examples/embed.cpp $(B)/obj/qwen3next.o $(B)/flags
	@mkdir -p $(@D) $(B)/obj
	$(COMPILE_CXX) -MF $(B)/obj/embed_cpp.d $< $(B)/obj/qwen3next.o $(LDFLAGS) $(LIBRARIES) -o $@

# ---- Test programs ----
#
# The implementation is compiled once a configuration.  tests/expose.awk makes two headers of
# qwen3next.h and of tools/q3n_make.h: one whose private functions are not static, which becomes
# exposed.o, and one without function bodies, which the tests include.  A test file reads
#
#     #define Q3N_IMPLEMENTATION          (not where the public API is enough)
#     #include "qwen3next.h"              (not "../qwen3next.h": that has the bodies too)
#     #include "q3n_make.h"               (where it makes models; Q3N_MAKE_IMPLEMENTATION as above)
#
# and links the object; a new tests/test_NAME.c is found by its name.
BODIES := $(B)/obj/bodies/q3n_make.h $(B)/obj/bodies/qwen3next.h
NAMES  := $(B)/obj/names/q3n_make.h $(B)/obj/names/qwen3next.h
PARTS  := $(BODIES) $(NAMES)
EXPOSE  = @mkdir -p $(@D); awk -v part=$* -f tests/expose.awk $< > $@

$(filter %/qwen3next.h,$(PARTS)): $(B)/obj/%/qwen3next.h: qwen3next.h tests/expose.awk
	$(EXPOSE)

$(filter %/q3n_make.h,$(PARTS)): $(B)/obj/%/q3n_make.h: tools/q3n_make.h tests/expose.awk
	$(EXPOSE)

# q3n_make.h includes the qwen3next.h beside it.
$(B)/obj/exposed.o: $(BODIES) tests/steps.h $(B)/flags
	$(COMPILE_C) -Wno-missing-prototypes -DSTEPS_COUNTED -include tests/steps.h \
	    -DQ3N_IMPLEMENTATION -DQ3N_MAKE_IMPLEMENTATION -x c -c $< -o $@

COMPILE_TEST = $(COMPILE_C) $(TEST_FLAGS) -I$(B)/obj/names
# The compiler for Windows appends .exe whether asked or not.
NO_EXE       = @if [ -e $@.exe ]; then mv $@.exe $@; fi
TEST_NEEDS  := $(NAMES) $(B)/obj/exposed.o $(B)/flags

$(B)/tests/test_%: tests/test_%.c $(TEST_NEEDS)
	@mkdir -p $(@D)
	$(COMPILE_TEST) -MF $@.d $< $(B)/obj/exposed.o $(LDFLAGS) $(CMOCKA) $(LIBRARIES) -o $@
	$(NO_EXE)

# The fuzz target with a main function that replays files.
$(B)/tests/replay_%: tests/fuzz_%.c $(TEST_NEEDS)
	@mkdir -p $(@D)
	$(COMPILE_TEST) -MF $@.d -DQ3N_FUZZ_REPLAY $< $(B)/obj/exposed.o $(LDFLAGS) $(LIBRARIES) -o $@

# Sanitizers and the C++ library that libFuzzer wants are linked statically, which takes clang++ to
# link: the targets also run on another Linux that has this C library or a newer one.
$(B)/obj/fuzz_%.o: tests/fuzz_%.c $(TEST_NEEDS)
	@mkdir -p $(@D)
	$(COMPILE_TEST) -c $< -o $@

$(B)/fuzz_%: $(B)/obj/fuzz_%.o $(B)/obj/exposed.o
	$(CC)++ $(MODE_FLAGS) -static-libstdc++ -static-libgcc $^ $(LDFLAGS) $(LIBRARIES) -o $@

-include $(wildcard $(B)/obj/*.d $(B)/obj/q3n/*.d $(B)/tests/*.d)

# ---- Models ----

# convert.py and what it imports: this is installed.
CONVERTER := $(patsubst %,tools/%.py,convert files hf_checkpoint hf_config hf_names \
               keras_checkpoint lora matrix model_plan q3n_file quantize safetensors_file \
               tokenizer_file)
CONVERT    = @mkdir -p $(@D); $(PY) tools/convert.py

define MODEL_FROM_DIRECTORY
build/models/$(1).q3n: $$(wildcard tests/golden/$(1)/*) $$(CONVERTER)
	$$(CONVERT) tests/golden/$(1) $$@ --type f32 --quiet
endef
$(foreach name,$(HF_GOLDENS),$(eval $(call MODEL_FROM_DIRECTORY,$(name))))

$(KERAS_GOLDENS:%=build/models/%.q3n): build/models/%.q3n: tests/golden/keras/%.keras $(CONVERTER)
	$(CONVERT) $< $@ --type f32 --quiet

$(STORIES): $(wildcard examples/stories/*) $(CONVERTER)
	$(CONVERT) examples/stories $@

build/qwen3-tokenizer/tokenizer.json: tests/qwen3-tokenizer/tokenizer.json.gz
	@mkdir -p $(@D)
	gzip -dc $< > $@

build/qwen3-tokenizer/%: tests/qwen3-tokenizer/%
	@mkdir -p $(@D)
	cp $< $@

$(TOKENIZER): tests/make_tokenizer_model.py build/qwen3-tokenizer/tokenizer.json \
              build/qwen3-tokenizer/tokenizer_config.json $(CONVERTER)
	@mkdir -p $(@D)
	$(PY) tests/make_tokenizer_model.py build/qwen3-tokenizer $@

# Small model files with everything in them, and chat templates: where the fuzzers start.
build/corpus.made: tests/make_fuzz_corpus.py tests/synthetic.py tests/golden/chat/golden.json \
                   $(CONVERTER)
	@rm -rf build/corpus build/corpus-chat
	@mkdir -p build/corpus
	$(PY) tests/make_fuzz_corpus.py build/corpus
	@touch $@

models: $(MODELS)   ## Convert the models that the tests use into build/models/

demo: $(B)/q3n $(STORIES)   ## Build, convert the built-in checkpoint, tell a story
	$(B)/q3n run $(STORIES) --echo -n 200 -p '<|endoftext|>Once upon a time'

# ---- Tests ----

# Every suite writes build/[<config>/]results/NAME; the summary counts them and misses those that
# could not even be built.
RESULTS := $(B)/results
C_SUITES.release  := $(C_TESTS)
C_SUITES.sanitize := $(C_TESTS)
C_SUITES.thread   := $(THREAD_TESTS)
C_SUITES.scalar   := $(C_TESTS)
C_SUITES.debug    := $(C_TESTS)
C_SUITES.coverage := $(C_TESTS)
C_SUITES.aarch64  := $(C_TESTS)
C_SUITES.windows  := $(C_TESTS)
SUITES := $(C_SUITES.$(config):%=$(RESULTS)/test_%)
SUITES.release   := $(addprefix $(RESULTS)/build_,gcc clang musl mingw aarch64) $(RESULTS)/lint \
                    $(RESULTS)/install \
                    $(PYTHON_TESTS:%=$(RESULTS)/test_%.py)
SUITES.sanitize  := $(FUZZ_TARGETS:%=$(RESULTS)/replay_%)
COMMAND_SUITES   := $(addprefix $(RESULTS)/test_,cli.py chat.py)
SUITES.coverage  := $(COMMAND_SUITES) $(FUZZ_TARGETS:%=$(RESULTS)/replay_%)
SUITES.aarch64   := $(COMMAND_SUITES) $(FUZZ_TARGETS:%=$(RESULTS)/replay_%)
SUITES := $(SUITES.$(config)) $(SUITES)
# name(config), as the reports show it
SHOWN = $(@F)$(if $(filter release,$(config)),,\($(config)\))

# The suites of one configuration; never fails, see the summary.
suites: $(SUITES)

# What a suite may read beside its own program.
SUITE_INPUTS := $(MODELS) build/corpus.made

$(RESULTS)/test_%: $(B)/tests/test_% $(SUITE_INPUTS) always
	@tests/run.sh $(SHOWN) $@ $(RUN) $<

$(RESULTS)/test_%.py: tests/test_%.py $(PROGRAMS) $(SUITE_INPUTS) always
	@Q3N='$(RUN) $(B)/q3n' QWEN3NEXT_LIB=$(B)/$(SHARED) PYTHONDONTWRITEBYTECODE=1 \
	    tests/run.sh $(SHOWN) $@ $(PY) -m unittest discover -v -s tests -p test_$*.py

$(RESULTS)/replay_%: $(B)/tests/replay_% $(SUITE_INPUTS) always
	@tests/run.sh $(SHOWN) $@ $(RUN) $< $(if $(filter chat,$*),build/corpus-chat/*,build/corpus/*.q3n)

$(RESULTS)/build_%: tests/test_build.sh $(SUITE_INPUTS) always
	@tests/run.sh $(SHOWN) $@ tests/test_build.sh $* build/matrix

# With + for the make in it, which takes what is built here.
$(RESULTS)/install: tests/test_install.sh $(PROGRAMS) $(SUITE_INPUTS) always
	+@MAKE='$(MAKE)' CC='$(CC)' tests/run.sh $(SHOWN) $@ tests/test_install.sh build/install

$(RESULTS)/lint: build/obj/lint.o always
	@tests/run.sh $(SHOWN) $@ $(PY) tools/lint.py --object $<

TEST_CONFIGS := release sanitize thread
# A goal that prints the names of a configuration's suites.
list-suites:
	@echo $(SUITES)

# Configurations run side by side, so that every CPU has work to the end.
$(TEST_CONFIGS:%=suites-%) $(addprefix suites-,aarch64 windows coverage): suites-%: suite-inputs
	+@$(SUBMAKE) -k -Otarget config=$* suites || true

suite-inputs:
	+@$(SUBMAKE) -k $(SUITE_INPUTS) || true

define RUN_SUITES
	+@$(SUBMAKE) $(1:%=suites-%)
	+@tests/run.sh --summary $$(for c in $(1); do $(SUBMAKE) -s config=$$c list-suites; done)
endef

test:   ## Run every test: C (also under ASan, UBSan, TSan), Python, build matrix, lint
	@rm -rf build/results build/sanitize/results build/thread/results
	$(call RUN_SUITES,$(TEST_CONFIGS))

test-aarch64:   ## Cross-compile the C tests and the command line, run them under qemu-user
	@rm -rf $(AARCH64)/results
	$(call RUN_SUITES,aarch64)

test-windows:   ## Compile the C tests for Windows, run them under wine
	@rm -rf $(WINDOWS)/results
	$(call RUN_SUITES,windows)

test-wasm: $(MODELS)   ## Compile the header for wasm32-wasi, run it in a WebAssembly runtime
	@rm -rf $(WASM)/results
	@tests/run.sh build_wasm $(WASM)/results/build_wasm tests/test_build.sh wasm build/matrix
	@tests/run.sh --summary $(WASM)/results/build_wasm

coverage:   ## Run the C and command line tests with gcov, print what they reach by section
	@rm -rf build/coverage
	$(call RUN_SUITES,coverage)
	@$(PY) tools/coverage.py build/coverage

# The same schedules as in the tests, and many more; SEED=N SCHEDULES=1 repeats one that failed.
SEED      ?= 1
SCHEDULES ?= 2000
stress: $(B)/tests/test_schedules $(MODELS)   ## Run SCHEDULES=2000 random schedules of sessions
	Q3N_SEED=$(SEED) Q3N_SCHEDULES=$(SCHEDULES) $(RUN) $<

# TAG is a section's, SUITES the tests that should notice.
TAG         ?= parallel
SUITES_WITH ?= parallel
mutate: $(PARTS) $(MODELS)   ## Plant faults in section TAG=parallel, run SUITES_WITH="parallel"
	@$(PY) tools/mutate.py $(TAG) $(SUITES_WITH) --cc $(CC) --build $(B)

compile-cost:   ## CPU seconds, peak memory and size of the implementation, by what is left out
	@$(PY) tools/compile_cost.py --cc "$(CC)"

FUZZ_SECONDS ?= 60
fuzz: build/corpus.made   ## Fuzz what reads files, templates (libFuzzer, clang), FUZZ_SECONDS=60
	+@$(SUBMAKE) config=fuzz $(FUZZ_TARGETS:%=build/fuzz/fuzz_%)
	@mkdir -p $(FUZZ_TARGETS:%=build/fuzz/found_%) build/fuzz/crashes
	for t in $(FUZZ_TARGETS); do build/fuzz/fuzz_$$t -max_total_time=$(FUZZ_SECONDS) \
	    -max_len=262144 -timeout=10 -rss_limit_mb=2048 -artifact_prefix=build/fuzz/crashes/ \
	    -print_final_stats=1 build/fuzz/found_$$t $$(case $$t in \
	        loader) echo build/corpus ;; chat) echo build/corpus-chat ;; esac) \
	    || exit 1; done

# Not position-independent: tables of pointers are then constant data, as they are in a program.
build/obj/lint.o: $(LIBRARY) qwen3next.h tools/q3n_make.h
	@mkdir -p $(@D)
	$(CC) -std=c11 -O1 -fno-pic -c $< -o $@

lint: build/obj/lint.o   ## Check the style: tools/lint.py
	@$(PY) tools/lint.py --sections --object $<

# ---- Speed ----

BENCH       ?= g1 g2 g3
TYPES       ?= q4 q8 bf16
THREADS     ?=
PEER        ?=
PEER_MODELS ?=
PEER_ARGS   ?=
BENCH_FLAGS ?=

# PEER="[NAME=]PATH ..." are llama-bench programs, PEER_MODELS is the folder of their models;
# tools/bench_table.py says more and takes BENCH_FLAGS.
bench: $(B)/q3n   ## Measure BENCH="g1 g2 g3" in TYPES="q4 q8 bf16", beside PEER=llama-bench
	@$(PYTHON) tools/bench_table.py --q3n $(B)/q3n --geometries "$(BENCH)" --types "$(TYPES)" \
	    --threads="$(THREADS)" --models build/models --out $(B)/bench --peer="$(PEER)" \
	    --peer-models="$(PEER_MODELS)" --peer-args="$(PEER_ARGS)" $(BENCH_FLAGS)

# SESSIONS: a model, or a preset as here, and other options of q3n bench.
SESSIONS ?= --preset g2 --type q4

bench-sessions: $(B)/q3n $(STORIES)   ## Measure many sessions, drafts, states
	$(B)/q3n bench $(SESSIONS) --batch 1,2,4,8,16
	$(B)/q3n bench $(STORIES) --mtp
	$(B)/q3n bench $(SESSIONS) --mtp
	$(B)/q3n bench $(SESSIONS) --session

# ---- Installing ----
#
# DESTDIR is put before every path and is in no file: packages are made so.
PREFIX      ?= /usr/local
BINDIR      ?= $(PREFIX)/bin
LIBDIR      ?= $(PREFIX)/lib
INCLUDEDIR  ?= $(PREFIX)/include
DATADIR     ?= $(PREFIX)/share
DOCDIR      ?= $(DATADIR)/doc/qwen3next
MANDIR      ?= $(DATADIR)/man
BASHDIR     ?= $(DATADIR)/bash-completion/completions
ZSHDIR      ?= $(DATADIR)/zsh/site-functions
FISHDIR     ?= $(DATADIR)/fish/vendor_completions.d
# Nobody else's: these are removed with what is in them.
CMAKEDIR    := $(LIBDIR)/cmake/qwen3next
TOOLDIR     := $(DATADIR)/qwen3next
INSTALL     ?= install
# The q3n that writes its manual page: another one where this one does not run.
HOST_Q3N    ?= $(RUN) $(B)/q3n

P := $(B)/package
HEADERS := qwen3next.h tools/q3n_make.h
# FOLDER:FILE, with the file's own name; a program is what lies in BINDIR.
INSTALLED := $(BINDIR):$(B)/q3n$(EXE) $(BINDIR):$(P)/q3n-convert \
    $(HEADERS:%=$(INCLUDEDIR):%) $(LIBDIR):$(B)/$(STATIC) \
    $(if $(IMPORTS),$(BINDIR):$(B)/$(SHARED) $(LIBDIR):$(B)/$(IMPORTS)) \
    $(if $(SHARED_FILE),$(LIBDIR):$(P)/$(SHARED_FILE)) $(LIBDIR)/pkgconfig:$(P)/qwen3next.pc \
    $(CMAKEDIR):$(P)/qwen3next-config.cmake $(CMAKEDIR):$(P)/qwen3next-config-version.cmake \
    $(MANDIR)/man1:$(P)/q3n.1 $(BASHDIR):$(P)/q3n $(ZSHDIR):$(P)/_q3n $(FISHDIR):$(P)/q3n.fish \
    $(DOCDIR):LICENSE $(CONVERTER:%=$(TOOLDIR):%)
folder_of = $(firstword $(subst :, ,$(1)))
file_of   = $(lastword $(subst :, ,$(1)))
GENERATED := $(filter $(P)/%,$(foreach i,$(INSTALLED),$(call file_of,$(i))))

# Paths may be others than the last time.
in_prefix  = $(patsubst $(PREFIX)/%,$${prefix}/%,$(1))
SUBSTITUTE = sed -e 's|@VERSION@|$(VERSION)|g' -e 's|@PREFIX@|$(PREFIX)|g' \
    -e 's|@LIBDIR@|$(LIBDIR)|g' -e 's|@INCLUDEDIR@|$(INCLUDEDIR)|g' \
    -e 's|@TOOLDIR@|$(TOOLDIR)|g' -e 's|@SHARED_NAME@|$(or $(SHARED_NAME),$(SHARED))|g' \
    -e 's|@PC_LIBDIR@|$(call in_prefix,$(LIBDIR))|g' \
    -e 's|@PC_INCLUDEDIR@|$(call in_prefix,$(INCLUDEDIR))|g'

$(P)/qwen3next.pc $(P)/q3n-convert: $(P)/%: tools/%.in always
	@mkdir -p $(@D)
	@$(SUBSTITUTE) $< > $@

$(P)/%.cmake: tools/cmake/%.cmake.in always
	@mkdir -p $(@D)
	@$(SUBSTITUTE) $< > $@

$(P)/$(SHARED_FILE): $(B)/$(SHARED)
	@mkdir -p $(@D)
	@cp $< $@

WRITE_HELP = @mkdir -p $(@D); $(HOST_Q3N) help
$(P)/q3n.1:    $(B)/q3n ; $(WRITE_HELP) --man > $@
$(P)/q3n:      $(B)/q3n ; $(WRITE_HELP) --completion bash > $@
$(P)/_q3n:     $(B)/q3n ; $(WRITE_HELP) --completion zsh > $@
$(P)/q3n.fish: $(B)/q3n ; $(WRITE_HELP) --completion fish > $@

INSTALL_ONE = $(INSTALL) -m $(if $(filter $(BINDIR):%,$(1)),755,644) $(call file_of,$(1)) \
    $(DESTDIR)$(call folder_of,$(1))/
define NEWLINE


endef

install: $(B)/q3n $(B)/$(SHARED) $(B)/$(STATIC)
install: $(GENERATED)   ## Copy programs, headers, libraries, manual to PREFIX=/usr/local
	@$(INSTALL) -d $(addprefix $(DESTDIR),$(sort $(foreach i,$(INSTALLED),$(call folder_of,$(i)))))
	$(foreach i,$(INSTALLED),@$(call INSTALL_ONE,$(i))$(NEWLINE)	)
	$(if $(SHARED_FILE),@ln -sf $(SHARED_FILE) $(DESTDIR)$(LIBDIR)/$(SHARED_NAME))
	$(if $(SHARED_FILE),@ln -sf $(SHARED_NAME) $(DESTDIR)$(LIBDIR)/$(SHARED))
	@echo 'installed in $(DESTDIR)$(PREFIX)'

uninstall:   ## Remove what install copied, by the same PREFIX
	@rm -f $(foreach i,$(INSTALLED),$(DESTDIR)$(call folder_of,$(i))/$(notdir $(call file_of,$(i))))
	$(if $(SHARED_FILE),@rm -f $(DESTDIR)$(LIBDIR)/$(SHARED_NAME) $(DESTDIR)$(LIBDIR)/$(SHARED))
	@rm -rf $(DESTDIR)$(CMAKEDIR) $(DESTDIR)$(TOOLDIR)
	@rmdir $(DESTDIR)$(DOCDIR) 2> /dev/null || true

# ---- The rest ----

clean:   ## Remove build/
	rm -rf build

endif

deps:   ## Install missing compilers, cmocka, cmake, pkg-config, python3-venv, numpy, h5py
	@CC='$(CC)' CXX='$(CXX)' PYTHON='$(PYTHON)' tools/deps.sh build build

deps-aarch64:   ## Install cross compiler, qemu-user and cmocka for test-aarch64
	@tools/deps.sh aarch64 $(AARCH64)

deps-windows:   ## Install MinGW-w64 and wine, compile cmocka for test-windows
	@tools/deps.sh windows $(WINDOWS)

deps-wasm:   ## Install a compiler and a runtime for test-wasm in build/
	@PYTHON='$(PYTHON)' tools/deps.sh wasm $(WASM)

help:   ## List the targets
	@sed -n 's/^\([a-z][a-z0-9-]*\):[^#]*##  *\(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) \
	    | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'
