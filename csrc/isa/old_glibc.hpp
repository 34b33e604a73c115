// Included before everything else where a wheel is built (`make wheel`): takes those versions of
// the C library's functions that glibc has had from the beginning, so that the wheel runs wherever
// manylinux_2_28 does, whatever system it was built on.
#include <features.h>

#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver dlopen,dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");
__asm__(".symver hypot,hypot@GLIBC_2.2.5");
__asm__(".symver pthread_mutex_trylock,pthread_mutex_trylock@GLIBC_2.2.5");
#endif
