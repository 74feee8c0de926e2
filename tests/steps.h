/* steps.h - counts the steps of searches in tables that files fill.  Tests bound the work of
 * hostile input by it, for a clock tells of other programs too.  exposed.o is compiled with it and
 * has the counter; no header is included, as the implementation wants to be first. */
#ifndef STEPS_H
#define STEPS_H

extern _Thread_local unsigned long long steps;

#ifdef STEPS_COUNTED
_Thread_local unsigned long long steps;
#  define Q3N__STEP() ((void)steps++)
#endif

#endif
