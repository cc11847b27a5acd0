// A wall clock that a test sets while programs run: LD_PRELOAD=wall_clock.so WALL_CLOCK_FILE=offset (8 bytes, seconds).
//
// Only CLOCK_REALTIME moves, as when an administrator or NTP sets it. libfaketime cannot do that to Python: with
// DONT_FAKE_MONOTONIC its clock_nanosleep answers EINVAL (0.9.10), without it intervals jump too.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t none = 0, *offset_s = &none;

__attribute__((constructor)) static void open_offset(void) {
  const char *path = getenv("WALL_CLOCK_FILE");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *page = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
  if (page != MAP_FAILED) offset_s = page;
  close(file);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int code = (int)syscall(SYS_clock_gettime, clock, now);
  if (code == 0 && clock == CLOCK_REALTIME) now->tv_sec += *offset_s;
  return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  (void)zone;
  struct timespec precise;
  int code = clock_gettime(CLOCK_REALTIME, &precise);
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return code;
}

time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}

// The kernel compares a deadline with its own clock. A deadline below 1e9 seconds is one of the monotonic clock.
int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
  typedef int (*wait_t)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
  wait_t wait = (wait_t)dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");  // not the one of 1999
  if (!wait) wait = (wait_t)dlsym(RTLD_NEXT, "pthread_cond_timedwait");
  struct timespec real = *until;
  if (real.tv_sec > 1000000000) real.tv_sec -= *offset_s;
  return wait(condition, mutex, &real);
}
