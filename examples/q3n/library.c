/* The library itself: this is all that a program has to do for qwen3next.h. */
#define Q3N_IMPLEMENTATION
#include "../../qwen3next.h"
