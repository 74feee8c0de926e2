/* The library as one object: what runs models, and what makes their files. */
#define Q3N_IMPLEMENTATION
#include "../../qwen3next.h"
#define Q3N_MAKE_IMPLEMENTATION
#include "../../tools/q3n_make.h"
