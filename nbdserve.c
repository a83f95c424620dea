/* nbdserve.c - a complete NBD server in one file.
 * SPDX-License-Identifier: 0BSD (full text at the end of nbdserve.h)
 *
 *   cc nbdserve.c -o nbdserve        a server: see README, or nbdserve --help
 *   cc -DNBDSERVE_NO_MAIN -c ...     a library: see nbdserve.h
 *
 * The protocol is doc/proto.md of NetworkBlockDevice/nbd; names that begin with
 * NBD_ are spelled as they are there.
 *
 * ---- Map ----------------------------------------------------------------
 * A section uses only what stands above it.  KEEP IT SO: nothing else makes a
 * file of this length readable.  `grep -n '==== \[' nbdserve.c` prints it.
 *
 *   [1]  CONFIG        NBDSERVE_  compile-time switches
 *   [2]  PLATFORM      os_        the operating system; all #if on it
 *   [3]  UTIL          u_         bytes, numbers, text, log
 *   [4]  SHA-256       sha_       FIPS 180-4
 *   [5]  WIRE          wire_      constants, messages, requests, tables
 *   [6]  SOCKET I/O    io_        bytes in and out, deadlines, stopping
 *   [7]  EXPORT        ex_        exports, one request on a backend
 *   [8]  HANDSHAKE     hs_        connections, option haggling
 *   [9]  TRANSMISSION  tx_        requests in, replies out
 *   [10] FLAT          flat_      backend: file, block device, memory
 *   [11] CAS           cas_       store of volumes and snapshots
 *   [12] SERVER        srv_       listeners, clients, the public calls
 *   [13] CLI           cli_       the command
 *
 * ---- Where to read about ... ----------------------------------------------
 *   the life of a request, its states, threads and buffers   head of [9]
 *   what makes a FLUSH cover another client's WRITE          (E3) in [7], (T3)
 *   a client that never reads, or stops halfway              (I2) in [6], (T5)
 *   what happens when the server stops                       (S3) in [12]
 *   the format of a store, and what keeps it whole           end of nbdserve.h
 *
 * ---- Where to add ... -----------------------------------------------------
 *   an option of the handshake  its number in enum nbd_opt; a function and a
 *                               row of hs_options in [8]
 *   a command                   its number in enum nbd_cmd; a row of wire_cmds;
 *                               a case in ex_call [7]; a line in
 *                               ex_transmission_flags if clients must be told
 *   a rule for requests         an `if` in tx_validate [9]
 *   a type of reply             its number in enum nbd_reply_type; when it is
 *                               sent and its head in tx_put_head, its data in
 *                               tx_data [9]
 *   a command-line option       a row of CLI_OPTIONS in [13]
 *   a command on stores         a row of cli_verbs in [13]
 *   a kind of target            cli_parse_target and cli_add_target in [13]
 *   an operating system         a body in the functions of [2]
 *
 * ---- Threads ------------------------------------------------------------
 * The host is the program that this file is linked into.  Its thread runs
 * nbdserve_run, which accepts clients, until nbdserve_stop.  The others:
 *
 *   thread      started by             runs                    ended by
 *   client's    nbdserve_run for each  srv_thread: [8], then   the client, or
 *               client it accepts      [9] until it has left   stopping
 *               (nbdserve_serve: it is
 *               the caller's own)
 *   worker      a client's thread,     tx_worker: one request  the client's
 *               when a request may     at a time               thread
 *               take long
 *   store's     a request or command   cas_work: fills the     itself, when it
 *               that leaves work       index, checkpoints      is done
 *               behind
 *   control     the command, when it   cli_control: commands   the server's
 *               serves a store         on that store           end
 *
 * ---- Locks, in the order in which they may be taken ------------------------
 * Each is named after the struct that it is in.
 *   1. nbdserve.lock      exports and their sizes, the list of clients
 *   2. conn.queue_lock    a client's queue, workers and statistics
 *   3. conn.send_lock     one writer on a client's socket at a time: the only
 *                         lock that is held while we wait for a client, and
 *                         only that client is delayed by it
 *   4. ex.serial          one call into an NBDSERVE_EXPORT_SERIAL backend
 *   5. ex.lock            an export's flush that runs, and its result
 *   6. flat.lock          what a file has turned out not to support; the I/O of
 *                         a temporary export
 *   7. nbdserve_cas.ckpt, then .lock: see [11]
 *   8. io_stop.lock       the moment at which the grace ends */

/* ==== [1] CONFIG (NBDSERVE_) =============================================
 * Set these with -D.  The NO_ and ONLY switches are 0 or 1; 1 takes a feature
 * out. */
#ifndef NBDSERVE_NO_MAIN
#define NBDSERVE_NO_MAIN 0 /* a library only: no main(), no command line */
#endif
#ifndef NBDSERVE_NO_FLAT
#define NBDSERVE_NO_FLAT 0 /* no backend for files, devices and memory */
#endif
#ifndef NBDSERVE_NO_CAS
#define NBDSERVE_NO_CAS 0 /* no content-addressed store */
#endif
#ifndef NBDSERVE_NO_HWSHA
#define NBDSERVE_NO_HWSHA 0 /* SHA-256 in plain C only */
#endif
#ifndef NBDSERVE_NO_TCP
#define NBDSERVE_NO_TCP 0 /* no TCP, no internet addresses */
#endif
#ifndef NBDSERVE_NO_THREADS
#define NBDSERVE_NO_THREADS 0 /* one client at a time, no pthread symbol */
#endif
#ifndef NBDSERVE_POSIX_ONLY
#define NBDSERVE_POSIX_ONLY 0 /* ignore what Linux and the BSDs add */
#endif
#ifndef NBDSERVE_MALLOC /* or two functions of yours with these types */
#define NBDSERVE_MALLOC malloc
#define NBDSERVE_FREE free
#endif
#ifndef NBDSERVE_MAX_REQUEST
#define NBDSERVE_MAX_REQUEST 67108864 /* bytes; a longer WRITE disconnects */
#endif
#ifndef NBDSERVE_MAX_OPTION
#define NBDSERVE_MAX_OPTION 65536 /* bytes of option data that are looked at */
#endif
#ifndef NBDSERVE_STACK
#define NBDSERVE_STACK 262144 /* bytes of stack of the library's threads */
#endif

/* ==== [2] PLATFORM (os_) =================================================
 * Everything that differs between systems.  A call that a system lacks, or
 * that a sandbox forbids, ends in a portable way or in -EOPNOTSUPP; no other
 * section asks which system this is.  Only locks are used, as tcc has no
 * atomics. */
#if defined __linux__ && !defined _GNU_SOURCE
#define _GNU_SOURCE 1
#elif defined __APPLE__ && !defined _DARWIN_C_SOURCE
#define _DARWIN_C_SOURCE 1
#elif defined __NetBSD__ && !defined _NETBSD_SOURCE
#define _NETBSD_SOURCE 1
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64
#endif

#include "nbdserve.h"

#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#if defined __x86_64__ && defined __GNUC__ && !defined __TINYC__ && \
    !NBDSERVE_NO_CAS && !NBDSERVE_NO_HWSHA && !NBDSERVE_POSIX_ONLY
#include <cpuid.h>
#include <immintrin.h>
#define OS_HWSHA 1
#define OS_HWSHA_TARGET __attribute__((target("sha,sse4.1")))

enum {
  OS_CPUID_1_ECX_SSE41 = 1 << 19,
  OS_CPUID_7_EBX_SHA = 1 << 29
};

/* Does this processor have the SHA-256 instructions that [4] uses? */
static int os_has_hwsha(void) {
  unsigned ebx = 0; /* what the processor does not tell stays 0 */
  unsigned ecx = 0;
  unsigned unused;
  __get_cpuid(1, &unused, &unused, &ecx, &unused);
  __get_cpuid_count(7, 0, &unused, &ebx, &unused, &unused);
  return (ecx & OS_CPUID_1_ECX_SSE41) && (ebx & OS_CPUID_7_EBX_SHA);
}
#else
#define OS_HWSHA 0
#define os_has_hwsha() 0
#endif

/* Prototypes, in case these are functions of the host's.  The parentheses keep
 * a function-like macro called malloc or free from being expanded here. */
void *(NBDSERVE_MALLOC)(size_t);
void(NBDSERVE_FREE)(void *);

#define STATIC_ASSERT(name, cond) typedef char assert_##name[(cond) ? 1 : -1]
STATIC_ASSERT(off_t_has_64_bits, sizeof(off_t) >= 8);

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

#if defined __linux__ && !NBDSERVE_POSIX_ONLY
#define OS_LINUX 1
#else
#define OS_LINUX 0
#endif
#ifndef SOCK_CLOEXEC
#define SOCK_CLOEXEC 0 /* os_set_fd_flags does it, a little later */
#endif
#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* SO_NOSIGPIPE does it: see os_setup_client */
#endif
#ifdef __GNUC__ /* lets printf-like functions be checked */
#define OS_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define OS_PRINTF(fmt, args)
#endif

/* ---- Locks and threads --------------------------------------------------
 * A monitor is a mutex and a condition variable: os_wait gives the mutex back
 * while it sleeps, and holds it again when it returns. */
#if NBDSERVE_NO_THREADS

/* With one thread there is nothing to lock and nobody to wait for. */
struct os_monitor {
  char unused;
};
#define os_monitor_init(m) ((m)->unused = 0)
#define os_monitor_free(m) ((void)(m))
#define os_lock(m) ((void)(m))
#define os_unlock(m) ((void)(m))
#define os_wait(m) ((void)(m))
#define os_wake_one(m) ((void)(m))
#define os_wake_all(m) ((void)(m))

/* Runs fn to its end, at once. */
#define os_thread(fn, arg) ((void)fn(arg), 0)

#else
#include <pthread.h>

struct os_monitor {
  pthread_mutex_t mutex;
  pthread_cond_t cond;
};

/* 0 or -errno; after an error nothing is left that had to be freed. */
static int os_monitor_init(struct os_monitor *m) {
  int err = pthread_mutex_init(&m->mutex, NULL);
  if (err) return -err;
  err = pthread_cond_init(&m->cond, NULL);
  if (err) pthread_mutex_destroy(&m->mutex);
  return -err;
}

/* Frees a monitor that os_monitor_init has made. */
static void os_monitor_free(struct os_monitor *m) {
  pthread_cond_destroy(&m->cond);
  pthread_mutex_destroy(&m->mutex);
}

/* Calls on a monitor that was made fail only if the caller is wrong. */
static void os_must(int err) {
  assert(!err);
  (void)err;
}

/* Takes the lock; not recursive. */
#define os_lock(m) os_must(pthread_mutex_lock(&(m)->mutex))

/* Gives the lock back. */
#define os_unlock(m) os_must(pthread_mutex_unlock(&(m)->mutex))

/* Waits until woken.  It may also return although nobody woke it, so callers
 * look again at what they wait for. */
#define os_wait(m) os_must(pthread_cond_wait(&(m)->cond, &(m)->mutex))

/* Wakes one of those that wait, whichever, or all of them. */
#define os_wake_one(m) os_must(pthread_cond_signal(&(m)->cond))
#define os_wake_all(m) os_must(pthread_cond_broadcast(&(m)->cond))

/* Starts a detached thread.  Asynchronous signals are the host's, and this
 * thread takes none of them.  Signals that a fault of the thread itself raises
 * are not blocked: a host may have a handler for SIGBUS or SIGSEGV, and to
 * fault with such a signal blocked ends the process. */
static int os_thread(void *(*fn)(void *), void *arg) {
  static const int synchronous[] = {SIGSEGV, SIGBUS,  SIGFPE, SIGILL,
                                    SIGTRAP, SIGABRT, SIGSYS};
  pthread_attr_t attr;
  pthread_t thread;
  sigset_t block;
  sigset_t before;
  sigfillset(&block);
  for (size_t i = 0; i < COUNT_OF(synchronous); i++)
    sigdelset(&block, synchronous[i]);
  int err = pthread_attr_init(&attr);
  if (err) return -err;
  /* Where the size is refused, the system's default will do. */
  pthread_attr_setstacksize(&attr, NBDSERVE_STACK);
  pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  pthread_sigmask(SIG_SETMASK, &block, &before); /* a thread inherits it */
  err = pthread_create(&thread, &attr, fn, arg);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attr);
  return -err;
}
#endif

/* Makes both monitors or none. */
static int os_monitors_init(struct os_monitor *a, struct os_monitor *b) {
  int err = os_monitor_init(a);
  if (err) return err;
  err = os_monitor_init(b);
  if (err) os_monitor_free(a);
  return err;
}

/* ---- Time, descriptors, sockets ------------------------------------------ */

/* Milliseconds of a clock that never jumps. */
static int64_t os_now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

enum os_blocking {
  OS_BLOCKING = 0,
  OS_NONBLOCKING = O_NONBLOCK /* what fcntl(2) wants */
};

/* Makes calls on fd wait or not, and keeps programs that the host runs from
 * inheriting it. */
static void os_set_fd_flags(int fd, enum os_blocking blocking) {
  int flags = fcntl(fd, F_GETFL) & ~O_NONBLOCK;
  fcntl(fd, F_SETFL, flags | (int)blocking);
  fcntl(fd, F_SETFD, FD_CLOEXEC);
}

/* Makes a channel that never blocks, to read from fd[0] and write to fd[1].  It
 * is a socket pair, because most systems can make that with FD_CLOEXEC at once.
 * After an error fd is as it was. */
static int os_pipe(int fd[2]) {
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd) < 0) return -errno;
  os_set_fd_flags(fd[0], OS_NONBLOCKING);
  os_set_fd_flags(fd[1], OS_NONBLOCKING);
  assert(fd[0] >= 0 && fd[1] >= 0);
  return 0;
}

/* Opens the directory that path is in.  A descriptor or -errno. */
static int os_open_dir(const char *path) {
  char dir[PATH_MAX];
  const char *slash = strrchr(path, '/');
  int n = slash ? (int)(slash - path) + 1 : 0;
  if (snprintf(dir, sizeof dir, "%.*s.", n, path) >= (int)sizeof dir)
    return -ENAMETOOLONG;
  int fd = open(dir, O_RDONLY | O_CLOEXEC);
  return fd < 0 ? -errno : fd;
}

/* Takes the next client of a listening socket: a blocking socket, or -errno. */
static int os_accept(int fd) {
#if OS_LINUX
  int client = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
#else
  int client = accept(fd, NULL, NULL);
  if (client >= 0) os_set_fd_flags(client, OS_BLOCKING); /* BSDs copy flags */
#endif
  return client < 0 ? -errno : client;
}

/* Sets a socket's option.  One that does not apply to fd fails, which does no
 * harm: that is why nobody looks at the result. */
static void os_set_option(int fd, int level, int option, int value) {
  setsockopt(fd, level, option, &value, sizeof value);
}

/* Prepares a TCP client's socket: no delay by Nagle's algorithm (proto.md,
 * Protocol phases), and a peer that has died is noticed within a minute: 30 s
 * of silence, then three questions, 10 s apart. */
static void os_setup_tcp(int fd) {
  os_set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  os_set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
#if defined TCP_KEEPIDLE && defined TCP_KEEPINTVL && defined TCP_KEEPCNT
  os_set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 30);
  os_set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, 10);
  os_set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
#elif defined TCP_KEEPALIVE
  os_set_option(fd, IPPROTO_TCP, TCP_KEEPALIVE, 30);
#endif
}

/* Prepares a client's socket of any kind: no SIGPIPE, and room for a long
 * reply, as far as the system allows, which is 3 times faster on Linux, 10 on
 * macOS. */
static void os_setup_client(int fd) {
#ifdef SO_NOSIGPIPE
  os_set_option(fd, SOL_SOCKET, SO_NOSIGPIPE, 1);
#endif
  os_set_option(fd, SOL_SOCKET, SO_SNDBUF, 2 << 20);
}

/* Calls that receive from a blocking socket fail with EAGAIN after ms. */
static void os_set_receive_timeout(int fd, uint32_t ms) {
  struct timeval t = {.tv_sec = ms / 1000, .tv_usec = (int)(ms % 1000) * 1000};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
}

/* Removes the first `done` bytes from the pieces (*v)[0..*n). */
static void os_advance(struct iovec **v, int *n, size_t done) {
  while (*n > 0 && done >= (*v)->iov_len) {
    done -= (*v)->iov_len;
    ++*v;
    --*n;
  }
  if (!done) return;
  assert(*n > 0);
  (*v)->iov_base = (char *)(*v)->iov_base + done;
  (*v)->iov_len -= done;
}

#if !NBDSERVE_NO_FLAT || !NBDSERVE_NO_CAS
/* ---- Files and block devices: for [10] and [11] -------------------------
 * Offsets and lengths have 64 bits without a sign everywhere else; here they
 * become an off_t.  The caller makes sure that no range reaches beyond
 * INT64_MAX, and each function asserts that.  A descriptor stays the caller's.
 *
 * Calls that a signal interrupts go on: a host may have handlers without
 * SA_RESTART. */

/* What a call moves.  The values are those of a boolean "writing". */
enum {
  OS_READ = 0,
  OS_WRITE = 1
};

#if !OS_LINUX && (defined __APPLE__ || NBDSERVE_POSIX_ONLY)
/* Where POSIX is all there is, one piece is moved at a time. */
#define preadv(fd, v, n, off) pread(fd, (v)->iov_base, (v)->iov_len, off)
#define pwritev(fd, v, n, off) pwrite(fd, (v)->iov_base, (v)->iov_len, off)
#endif

/* Moves what one system call moves of v[0..n); as pread(2) and pwrite(2).  For
 * a single piece the plain calls are a little faster. */
static ssize_t os_transfer_some(int fd, int writing, const struct iovec *v,
                                int n, off_t off) {
  if (n > 1) return writing ? pwritev(fd, v, n, off) : preadv(fd, v, n, off);
  return writing ? pwrite(fd, v->iov_base, v->iov_len, off)
                 : pread(fd, v->iov_base, v->iov_len, off);
}

/* Reads (OS_READ) or writes (OS_WRITE) all of v[0..n), which lies at off in one
 * piece.  Changes v.  No piece may be empty.
 *
 * The system may do less than it was asked to (at a signal, a full disk, or
 * after 2 GiB); what is left is asked for again until it is done or an error
 * tells why not.  After an error some of it may have been done.  -EIO: the file
 * ends before all was read. */
static int os_transfer(int fd, int writing, struct iovec *v, int n,
                       uint64_t off) {
  assert(writing == OS_READ || writing == OS_WRITE);
  while (n > 0) {
    assert(v->iov_len > 0); /* else 0 would not mean the end of the file */
    assert(off <= INT64_MAX);
    ssize_t done = os_transfer_some(fd, writing, v, n, (off_t)off);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return -errno;
    if (done == 0) return -EIO;
    off += (uint64_t)done;
    os_advance(&v, &n, (size_t)done);
  }
  return 0;
}

#ifdef __APPLE__
/* Asks the drive to empty its cache, which fsync(2) does not on this system.
 * Where a file system cannot do that, fsync is the best there is. */
static int os_try_datasync(int fd) {
  int r = fcntl(fd, F_FULLFSYNC);
  return r < 0 && errno != EINTR && errno != EIO ? fsync(fd) : r;
}
#else
#define os_try_datasync(fd) fdatasync(fd)
#endif

/* When it returns 0, all that was written to fd is on the medium, with as much
 * of the file's metadata as it takes to read it.  After any error nobody knows
 * what is there, and a second call tells nothing about it: see (F1), (C14). */
static int os_datasync(int fd) {
  while (os_try_datasync(fd) < 0)
    if (errno != EINTR) return -errno;
  return 0;
}

/* What os_fallocate does to a range.  The numbers are those of Linux. */
enum {
  OS_ALLOCATE = 0,    /* has space, maybe with a larger file; keeps its data */
  OS_PUNCH_HOLE = 3,  /* gives its space back; reads as zeroes; same size */
  OS_ZERO_RANGE = 17, /* reads as zeroes and has space; same size */
  OS_FALLOCATE_MODES  /* all are below this */
};

#if OS_LINUX
#ifdef FALLOC_FL_ZERO_RANGE /* musl does not name it */
STATIC_ASSERT(punch_hole_is_linux_s,
              OS_PUNCH_HOLE == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE));
STATIC_ASSERT(zero_range_is_linux_s,
              OS_ZERO_RANGE == (FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE));
#endif

/* Changes the space behind a range.  -EINVAL: not at these boundaries, as for a
 * part of a device's sector.  -EOPNOTSUPP: this kind of file (ENODEV), its file
 * system or a sandbox (EPERM or ENOSYS) does not have that. */
static int os_fallocate(int fd, int mode, uint64_t off, uint64_t len) {
  assert(mode >= 0 && mode < OS_FALLOCATE_MODES);
  assert(len > 0 && off <= INT64_MAX && len <= INT64_MAX - off);
  while (fallocate(fd, mode, (off_t)off, (off_t)len) < 0) {
    if (errno == ENOSYS || errno == EPERM || errno == ENODEV)
      return -EOPNOTSUPP;
    if (errno != EINTR) return -errno;
  }
  return 0;
}
#else
/* Other systems have nothing that keeps all these promises. */
#define os_fallocate(fd, mode, off, len) \
  ((void)(fd), (void)(mode), (void)(off), (void)(len), -EOPNOTSUPP)
#endif

/* Keeps other servers out, until fd is closed: a writer keeps out everybody, a
 * reader keeps out writers.  -EBUSY: another server is there already.  On a
 * file system without locks nobody is kept out.
 *
 * We use flock(2) because its lock belongs to the descriptor.  A lock of
 * fcntl(2) belongs to the process: it would let one server open a file twice,
 * and vanish when the process closes any other descriptor of the file. */
static int os_lock_file(int fd, int readonly) {
  int r = flock(fd, (readonly ? LOCK_SH : LOCK_EX) | LOCK_NB);
  return r < 0 && (errno == EWOULDBLOCK || errno == EAGAIN) ? -EBUSY : 0;
}

/* Makes a new file and its name survive a power cut.  fd is the file at path.
 * First the file, then the name: a name must not lead to a file that is not
 * there yet. */
static int os_sync_new_file(int fd, const char *path) {
  int err = os_datasync(fd);
  if (err) return err;
  int dir = os_open_dir(path);
  if (dir < 0) return dir;
  err = os_datasync(dir);
  close(dir);
  return err == -EINVAL ? 0 : err; /* some directories cannot be synced */
}

/* Removes the file at path if it still is the one that fd is: in the meantime
 * somebody may have put another one there, which is not ours to remove. */
static void os_remove_own_file(const char *path, int fd) {
  struct stat own;
  struct stat found;
  if (fstat(fd, &own) < 0 || lstat(path, &found) < 0) return;
  if (own.st_dev == found.st_dev && own.st_ino == found.st_ino) unlink(path);
}

#if OS_LINUX
/* Puts a question to a block device: a BLK* of <linux/fs.h>, which not every
 * libc comes with.  A file knows no answer, which means no.  Some answers fill
 * only the first half of `yes`. */
static int os_ask_device(int fd, unsigned question) {
  int yes = 0;
  return ioctl(fd, question, &yes) == 0 && yes;
}
#else
/* There is nobody to ask. */
#define os_ask_device(fd, question) ((void)(fd), 0)
#endif

/* BLKROGET: does the device refuse writes?  Linux opens such a device for
 * writing nevertheless; elsewhere opening it must tell. */
#define os_is_readonly_device(fd) os_ask_device(fd, _IO(0x12, 94))

/* BLKROTATIONAL: does the device have a head to move? */
#define os_is_rotational(fd) os_ask_device(fd, _IO(0x12, 126))
#endif

#if !NBDSERVE_NO_FLAT
/* ---- Files and block devices: for [10] alone ---------------------------- */

#if defined SEEK_HOLE && !NBDSERVE_POSIX_ONLY
/* Returns 1 if there is data at off, and 0 if there is a hole, which reads as
 * zeroes.  *next: where the data or the hole ends, at most end.
 *
 * When in doubt it is data: clients skip what they are told is a hole, so a
 * hole that is called data costs time, and data that is called a hole is lost.
 * Other threads may change the file in between; each answer was true once. */
static int os_is_data(int fd, uint64_t off, uint64_t end, uint64_t *next) {
  assert(off < end && end <= INT64_MAX);
  *next = end;
  off_t data = lseek(fd, (off_t)off, SEEK_DATA);
  /* ENXIO: there is no data behind off.  All up to end is a hole, unless the
   * file has become shorter: a read behind its end must still fail.  After any
   * other error the file system does not know. */
  if (data < 0) return errno != ENXIO || lseek(fd, 0, SEEK_END) < (off_t)end;
  int is_data = data == (off_t)off;
  off_t edge = is_data ? lseek(fd, (off_t)off, SEEK_HOLE) : data;
  if (edge > (off_t)off && edge < (off_t)end) *next = (uint64_t)edge;
  assert(*next > off && *next <= end);
  return is_data;
}
#else
/* Where files do not tell their holes, all is data. */
#define os_is_data(fd, off, end, next) ((void)(*(next) = (end)), 1)
#endif

/* Opens a private file that is gone when it is closed: in dir or, if dir is
 * NULL, in memory, or in /tmp where the system has no files in memory.
 * The caller owns the descriptor.
 *
 * The ways are tried from the best to the one that works everywhere, without a
 * look at why one has failed.  -errno: of the last one. */
static int os_nameless_file(const char *dir) {
  char path[PATH_MAX];
#if OS_LINUX && defined MFD_CLOEXEC
  int memory = dir ? -1 : memfd_create("nbdserve", MFD_CLOEXEC);
  if (memory >= 0) return memory;
#endif
  if (!dir) dir = "/tmp";
#if OS_LINUX && defined O_TMPFILE
  /* This file never has a name, and O_EXCL lets nobody give it one.  Not every
   * file system has that. */
  int unnamed = open(dir, O_TMPFILE | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
  if (unnamed >= 0) return unnamed;
#endif
  /* This file has a name for a moment.  mkstemp makes the name up and refuses
   * one that is there, so it follows no link that others may have placed. */
  if (snprintf(path, sizeof path, "%s/nbdserveXXXXXX", dir) >= PATH_MAX)
    return -ENAMETOOLONG;
  int fd = mkstemp(path);
  if (fd < 0) return -errno;
  fcntl(fd, F_SETFD, FD_CLOEXEC);
  if (unlink(path) == 0) return fd;
  int err = -errno;
  close(fd);
  return err;
}

#if defined POSIX_FADV_WILLNEED && !NBDSERVE_POSIX_ONLY
/* Says that a range will be read soon. */
static void os_willneed(int fd, uint64_t off, uint64_t len) {
  assert(off <= INT64_MAX && len <= INT64_MAX - off);
  posix_fadvise(fd, (off_t)off, (off_t)len, POSIX_FADV_WILLNEED);
}
#else
/* This system cannot be told. */
#define os_willneed(fd, off, len) ((void)(fd), (void)(off), (void)(len))
#endif

#endif /* !NBDSERVE_NO_FLAT */

/* ==== [3] UTIL (u_) ======================================================
 * Bytes of network and disk go through u_get and u_put: they are big-endian
 * there and lie at any address, so no struct is ever laid over them. */

/* Reads a 16-bit number. */
static uint16_t u_get16(const unsigned char *p) {
  return (uint16_t)(p[0] << 8 | p[1]);
}

/* Reads a 32-bit number. */
static uint32_t u_get32(const unsigned char *p) {
  return (uint32_t)u_get16(p) << 16 | u_get16(p + 2);
}

/* Reads a 64-bit number. */
static uint64_t u_get64(const unsigned char *p) {
  return (uint64_t)u_get32(p) << 32 | u_get32(p + 4);
}

/* Writes the lower 16 bits of v. */
static void u_put16(unsigned char *p, unsigned v) {
  p[0] = (unsigned char)(v >> 8);
  p[1] = (unsigned char)v;
}

/* Writes a 32-bit number. */
static void u_put32(unsigned char *p, uint32_t v) {
  u_put16(p, v >> 16);
  u_put16(p + 2, v);
}

/* Writes a 64-bit number. */
static void u_put64(unsigned char *p, uint64_t v) {
  u_put32(p, (uint32_t)(v >> 32));
  u_put32(p + 4, (uint32_t)v);
}

/* The smaller of two numbers. */
static uint64_t u_min(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

/* Is v one of 1, 2, 4, 8, ...? */
static int u_is_power_of_2(uint64_t v) {
  return v && !(v & (v - 1));
}

/* Are all n bytes zero?  Reads 32 at a time: memcmp goes byte by byte in musl,
 * and data that is not zero mostly shows it in its first word. */
static int u_is_zero(const unsigned char *p, size_t n) {
  uint64_t v[4];
  while (n >= sizeof v) {
    memcpy(v, p, sizeof v);
    if (v[0] | v[1] | v[2] | v[3]) return 0;
    p += sizeof v;
    n -= sizeof v;
  }
  while (n > 0)
    if (p[--n]) return 0;
  return 1;
}

/* Memory of n bytes, all zero, or NULL. */
static void *u_zalloc(size_t n) {
  void *p = NBDSERVE_MALLOC(n);
  return p ? memset(p, 0, n) : NULL;
}

/* Parses digits, with one of K M G T P E behind them for powers of 1024, into a
 * number up to INT64_MAX.  Returns the first character not used, or NULL when
 * there is no such number; *out is then unchanged. */
static const char *u_parse_size(const char *s, uint64_t *out) {
  static const char units[] = "KMGTPEkmgtpe";
  const char *p = s;
  uint64_t v = 0;
  for (; *p >= '0' && *p <= '9'; p++) {
    uint64_t digit = (uint64_t)(*p - '0');
    if (v > (INT64_MAX - digit) / 10) return NULL;
    v = v * 10 + digit;
  }
  const char *unit = *p ? strchr(units, *p) : NULL;
  int shift = unit ? (int)((unit - units) % 6 + 1) * 10 : 0;
  if (p == s || v > (uint64_t)INT64_MAX >> shift) return NULL;
  *out = v << shift;
  assert(*out <= INT64_MAX);
  return unit ? p + 1 : p;
}

/* Is all of s a number, as in u_parse_size, of at most max?  *out may have
 * changed even if it is not. */
static int u_parse_number(const char *s, uint64_t max, uint64_t *out) {
  const char *rest = u_parse_size(s, out);
  return rest && !*rest && *out <= max;
}

/* The text of a -errno value.  strerror returns a constant for every number
 * that the system knows; only for others does it use memory that threads
 * share. */
static const char *u_errno_text(int err) {
  return strerror(-err);
}

/* May c stand in a URI as it is?  (RFC 3986, 2.3, and the slash.)  No isalnum
 * here: that asks the host's locale. */
static int u_is_uri_char(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
         (c >= '0' && c <= '9') || (c && strchr("-._~/", c));
}

/* Appends s to the text in buf[size]; what a URI may not hold becomes %XX.
 * Returns false if there is no room; buf then holds a part of it. */
static int u_append_uri(char *buf, size_t size, const char *s) {
  size_t n = strlen(buf);
  assert(n < size);
  for (; *s && n < size; s++) {
    const char *const format = u_is_uri_char(*s) ? "%c" : "%%%02X";
    n += (size_t)snprintf(buf + n, size - n, format, (unsigned char)*s);
  }
  return n < size;
}

/* The length in bytes of the UTF-8 character at s (RFC 3629), or 0 if it is
 * malformed, too long a form, a surrogate or a control character. */
static int u_utf8_len(const char *s) {
  /* By the number of ones at the front of the first byte, which is that of all
   * bytes, or 0 for ASCII.  Below it: a control, or a shorter form exists. */
  static const uint32_t least[] = {0x20, UINT32_MAX, 0xa0, 0x800, 0x10000};
  const unsigned char *p = (const unsigned char *)s;
  int ones = 0;
  while (p[0] << ones & 0x80)
    ones++;
  if (ones > 4) return 0;
  uint32_t c = p[0] & (0x7fu >> ones);
  for (int i = 1; i < ones; i++) {
    if (p[i] >> 6 != 0x2) return 0; /* the NUL at the end is none, either */
    c = c << 6 | (p[i] & 0x3f);
  }
  if (c < least[ones] || c == 0x7f || c > 0x10ffff) return 0;
  if (c >= 0xd800 && c <= 0xdfff) return 0; /* a surrogate */
  return ones ? ones : 1;
}

/* Gives the host a message if it wants messages of that level.  Parts of it may
 * come from a client: what is no text in it becomes '?'.  The caller holds no
 * lock: the host's function may call back, for nbdserve_stats say. */
static void OS_PRINTF(3, 4) u_log(const struct nbdserve_config *config,
                                  int level, const char *fmt, ...) {
  char text[512]; /* a longer message is cut */
  va_list ap;
  if (!config->log || level > config->log_level) return;
  va_start(ap, fmt);
  vsnprintf(text, sizeof text, fmt, ap);
  va_end(ap);
  for (char *p = text; *p; p += u_utf8_len(p))
    if (!u_utf8_len(p)) *p = '?';
  config->log(config->ctx, level, text);
}

/* ==== [4] SHA-256 (sha_) =================================================
 * SHA-256 (FIPS 180-4) of one message, or of two messages of the same length
 * side by side.
 *
 * Why two: many x86 processors have instructions for SHA-256, but each of
 * these waits for the result of the one before, so one message alone leaves
 * most of the processor idle.  The instructions for a second message fit into
 * the gaps, and two digests take about as long as one.
 *
 * A state is the eight words that the standard calls A to H.  They lie in
 * memory in the order F E B A H G D C, because the instructions want ABEF in
 * one register and CDGH in another one, A and C as the highest words.  All code
 * below uses that order, so that no state is ever rearranged. */
#if !NBDSERVE_NO_CAS

/* Where each word lies in a state */
enum {
  SHA_F,
  SHA_E,
  SHA_B,
  SHA_A,
  SHA_H,
  SHA_G,
  SHA_D,
  SHA_C,
  SHA_STATE_WORDS
};

enum {
  SHA_BLOCK_LEN = 64, /* bytes that are mixed into the state at a time */
  SHA_ROUNDS = 64,    /* rounds for each block */
  SHA_COUNT_LEN = 8   /* bytes at a message's end that hold its length */
};

/* The constant that goes into each round: the first 32 bits of the fractional
 * part of the cube root of each of the first 64 primes */
static const uint32_t sha_k[SHA_ROUNDS] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1,
    0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3,
    0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
    0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
    0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
    0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
    0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

/* The functions of the standard.  They are macros because tcc does not inline;
 * their arguments are evaluated several times. */
#define SHA_ROR(x, n) ((x) >> (n) | (x) << (32 - (n)))
#define SHA_BIG_SIGMA0(x) (SHA_ROR(x, 2) ^ SHA_ROR(x, 13) ^ SHA_ROR(x, 22))
#define SHA_BIG_SIGMA1(x) (SHA_ROR(x, 6) ^ SHA_ROR(x, 11) ^ SHA_ROR(x, 25))
#define SHA_SIGMA0(x) (SHA_ROR(x, 7) ^ SHA_ROR(x, 18) ^ (x) >> 3)
#define SHA_SIGMA1(x) (SHA_ROR(x, 17) ^ SHA_ROR(x, 19) ^ (x) >> 10)
#define SHA_CHOOSE(x, y, z) (((x) & (y)) ^ (~(x) & (z)))
#define SHA_MAJORITY(x, y, z) (((x) & (y)) ^ ((x) & (z)) ^ ((y) & (z)))

/* One round on the state v.  The standard moves every word one place on after
 * each round; here the words stay where they are, and the next round names
 * them differently instead.  addend: the constant plus the message's word. */
#define SHA_ROUND(v, a, b, c, d, e, f, g, h, addend) \
  do { \
    v[SHA_##h] += SHA_BIG_SIGMA1(v[SHA_##e]) + \
                  SHA_CHOOSE(v[SHA_##e], v[SHA_##f], v[SHA_##g]) + (addend); \
    v[SHA_##d] += v[SHA_##h]; \
    v[SHA_##h] += SHA_BIG_SIGMA0(v[SHA_##a]) + \
                  SHA_MAJORITY(v[SHA_##a], v[SHA_##b], v[SHA_##c]); \
  } while (0)

/* Computes the words that the rounds for a block take, one each.  The first 16
 * are the block, big-endian; every other one is made of four before it. */
static void sha_schedule(uint32_t w[SHA_ROUNDS], const unsigned char *block) {
  int i;
  for (i = 0; i < 16; i++)
    w[i] = u_get32(block + 4 * i);
  for (; i < SHA_ROUNDS; i++)
    w[i] = SHA_SIGMA1(w[i - 2]) + w[i - 7] + SHA_SIGMA0(w[i - 15]) + w[i - 16];
}

/* Mixes nblocks blocks into a state, in plain C.  For each block a copy of the
 * state goes through all rounds and is then added to the state. */
static void sha_portable(uint32_t *state, const unsigned char *blocks,
                         size_t nblocks) {
  uint32_t w[SHA_ROUNDS];
  uint32_t v[SHA_STATE_WORDS];
  for (; nblocks > 0; nblocks--, blocks += SHA_BLOCK_LEN) {
    sha_schedule(w, blocks);
    memcpy(v, state, sizeof v);
    for (int i = 0; i < SHA_ROUNDS; i += 8) {
      SHA_ROUND(v, A, B, C, D, E, F, G, H, sha_k[i] + w[i]);
      SHA_ROUND(v, H, A, B, C, D, E, F, G, sha_k[i + 1] + w[i + 1]);
      SHA_ROUND(v, G, H, A, B, C, D, E, F, sha_k[i + 2] + w[i + 2]);
      SHA_ROUND(v, F, G, H, A, B, C, D, E, sha_k[i + 3] + w[i + 3]);
      SHA_ROUND(v, E, F, G, H, A, B, C, D, sha_k[i + 4] + w[i + 4]);
      SHA_ROUND(v, D, E, F, G, H, A, B, C, sha_k[i + 5] + w[i + 5]);
      SHA_ROUND(v, C, D, E, F, G, H, A, B, sha_k[i + 6] + w[i + 6]);
      SHA_ROUND(v, B, C, D, E, F, G, H, A, sha_k[i + 7] + w[i + 7]);
    }
    for (int i = 0; i < SHA_STATE_WORDS; i++)
      state[i] += v[i];
  }
}

#if OS_HWSHA
/* One of the two messages that the instructions work on.  All of it can
 * stay in registers: two lanes, the constants and what is in between fit into
 * the 16 that the processor has. */
struct sha_lane {
  __m128i abef; /* half of the state */
  __m128i cdgh; /* the other half */
  __m128i w[4]; /* 16 words of the message's schedule, the next ones first */
};

/* Loads four words from anywhere. */
static inline OS_HWSHA_TARGET __m128i sha_load(const void *from) {
  return _mm_loadu_si128((const __m128i *)from);
}

/* Loads a block of the message, whose words are big-endian.  There is no loop
 * because gcc would keep an array that a loop indexes in memory. */
static inline OS_HWSHA_TARGET void sha_lane_load(struct sha_lane *lane,
                                                 const unsigned char *block) {
  const __m128i order = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  lane->w[0] = _mm_shuffle_epi8(sha_load(block), order);
  lane->w[1] = _mm_shuffle_epi8(sha_load(block + 16), order);
  lane->w[2] = _mm_shuffle_epi8(sha_load(block + 32), order);
  lane->w[3] = _mm_shuffle_epi8(sha_load(block + 48), order);
}

/* Does four rounds, k being their constants, and computes the four words of the
 * schedule that the rounds need 16 later.  The last four calls for a block
 * compute words in vain; a second loop without that was not faster. */
static inline OS_HWSHA_TARGET void sha_lane_rounds(struct sha_lane *lane,
                                                   __m128i k) {
  __m128i *w = lane->w;
  __m128i addend = _mm_add_epi32(w[0], k);
  /* Each of these does two rounds, on the lower half of addend.  The old ABEF
   * is the new CDGH, so the halves change places twice. */
  lane->cdgh = _mm_sha256rnds2_epu32(lane->cdgh, lane->abef, addend);
  addend = _mm_shuffle_epi32(addend, 14); /* the upper half */
  lane->abef = _mm_sha256rnds2_epu32(lane->abef, lane->cdgh, addend);
  __m128i seven_back = _mm_alignr_epi8(w[3], w[2], 4);
  __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w[0], w[1]), seven_back);
  w[0] = w[1];
  w[1] = w[2];
  w[2] = w[3];
  w[3] = _mm_sha256msg2_epu32(sum, w[2]);
}

/* Adds a state to what the rounds made of it, and saves the sum as the state,
 * from which the next block goes on. */
static inline OS_HWSHA_TARGET void sha_lane_save(struct sha_lane *lane,
                                                 uint32_t *state) {
  lane->abef = _mm_add_epi32(lane->abef, sha_load(state + SHA_F));
  lane->cdgh = _mm_add_epi32(lane->cdgh, sha_load(state + SHA_H));
  _mm_storeu_si128((__m128i *)(void *)(state + SHA_F), lane->abef);
  _mm_storeu_si128((__m128i *)(void *)(state + SHA_H), lane->cdgh);
}

/* Mixes nblocks blocks each into two states, with the instructions.  The lines
 * for the two lanes alternate, and the compiler keeps that order more or less;
 * the processor does the rest. */
static OS_HWSHA_TARGET void sha_hw(uint32_t state[2][SHA_STATE_WORDS],
                                   const unsigned char *const blocks[2],
                                   size_t nblocks) {
  struct sha_lane lane = {.abef = sha_load(&state[0][SHA_F]),
                          .cdgh = sha_load(&state[0][SHA_H])};
  struct sha_lane other = {.abef = sha_load(&state[1][SHA_F]),
                           .cdgh = sha_load(&state[1][SHA_H])};
  for (size_t i = 0; i < nblocks; i++) {
    sha_lane_load(&lane, blocks[0] + SHA_BLOCK_LEN * i);
    sha_lane_load(&other, blocks[1] + SHA_BLOCK_LEN * i);
    for (int round = 0; round < SHA_ROUNDS; round += 4) {
      __m128i k = sha_load(sha_k + round);
      sha_lane_rounds(&lane, k);
      sha_lane_rounds(&other, k);
    }
    sha_lane_save(&lane, state[0]);
    sha_lane_save(&other, state[1]);
  }
}

#else
#define sha_hw(state, blocks, nblocks) assert(0)
#endif

/* Mixes nblocks blocks each into two states.  use_hw: with the instructions,
 * both at once; then there must be blocks for both, maybe the same ones.  Else
 * blocks[1] may be NULL. */
static void sha_mix(int use_hw, uint32_t state[2][SHA_STATE_WORDS],
                    const unsigned char *const blocks[2], size_t nblocks) {
  assert(OS_HWSHA || !use_hw);
  assert(blocks[1] || !use_hw || !nblocks);
  if (use_hw) {
    sha_hw(state, blocks, nblocks);
    return;
  }
  sha_portable(state[0], blocks[0], nblocks);
  if (blocks[1]) sha_portable(state[1], blocks[1], nblocks);
}

/* Writes what comes behind the last whole block of a message, and returns how
 * many blocks that takes, 1 or 2:
 *
 *   the rest of the message, 0 to 63 bytes
 *   the byte 0x80
 *   zeroes, as few as it takes to fill the last block
 *   the length of the whole message in bits, 8 bytes */
static size_t sha_pad(unsigned char tail[2 * SHA_BLOCK_LEN],
                      const unsigned char *message, size_t len) {
  size_t rest = len % SHA_BLOCK_LEN;
  size_t nblocks = rest + 1 + SHA_COUNT_LEN <= SHA_BLOCK_LEN ? 1 : 2;
  size_t end = SHA_BLOCK_LEN * nblocks;
  memset(tail, 0, end);
  if (rest) memcpy(tail, message + (len - rest), rest); /* else maybe NULL */
  tail[rest] = 0x80;
  assert(rest + 1 <= end - SHA_COUNT_LEN);
  u_put64(tail + end - SHA_COUNT_LEN, (uint64_t)len * 8);
  return nblocks;
}

/* Writes the digest that a state stands for, once all blocks are mixed in. */
static void sha_put_digest(unsigned char digest[32], const uint32_t *state) {
  static const unsigned char order[SHA_STATE_WORDS] = {
      SHA_A, SHA_B, SHA_C, SHA_D, SHA_E, SHA_F, SHA_G, SHA_H};
  for (int i = 0; i < SHA_STATE_WORDS; i++)
    u_put32(digest + 4 * i, state[order[i]]);
}

/* Writes the digest of first[len] to first_digest and, if second is not NULL,
 * the digest of second[len] to second_digest.  A digest may be written over its
 * own message.  use_hw: use the processor's instructions; only where
 * os_has_hwsha. */
static void sha_256(int use_hw, const void *first, const void *second,
                    size_t len, unsigned char *first_digest,
                    unsigned char *second_digest) {
  static const uint32_t start[SHA_STATE_WORDS] = {
      [SHA_A] = 0x6a09e667, [SHA_B] = 0xbb67ae85, [SHA_C] = 0x3c6ef372,
      [SHA_D] = 0xa54ff53a, [SHA_E] = 0x510e527f, [SHA_F] = 0x9b05688c,
      [SHA_G] = 0x1f83d9ab, [SHA_H] = 0x5be0cd19};
  uint32_t state[2][SHA_STATE_WORDS];
  unsigned char tail[2][2 * SHA_BLOCK_LEN];
  assert(first || !len);
  assert(second_digest || !second);

  /* The instructions always work on two messages.  A single message keeps
   * itself company, and the second result is not looked at. */
  int is_pair = use_hw || second;
  const unsigned char *other = second ? second : first;
  const unsigned char *messages[] = {first, is_pair ? other : NULL};
  const unsigned char *tails[] = {tail[0], is_pair ? tail[1] : NULL};
  memcpy(state[0], start, sizeof start);
  memcpy(state[1], start, sizeof start);
  size_t ntail = sha_pad(tail[0], first, len);
  if (is_pair) sha_pad(tail[1], other, len);
  sha_mix(use_hw, state, messages, len / SHA_BLOCK_LEN);
  sha_mix(use_hw, state, tails, ntail);
  sha_put_digest(first_digest, state[0]);
  if (second) sha_put_digest(second_digest, state[1]);
}

#endif /* !NBDSERVE_NO_CAS */

/* ==== [5] WIRE (wire_) ===================================================
 * The protocol's numbers, the layout of its messages, and what is true of each
 * command.  All integers are big-endian.  Every message is drawn here, also
 * those that only one place of [8] or [9] reads or writes. */

/* proto.md, Newstyle negotiation and Option types */
#define NBD_INIT_MAGIC UINT64_C(0x4e42444d41474943)   /* "NBDMAGIC" */
#define NBD_OPTION_MAGIC UINT64_C(0x49484156454f5054) /* "IHAVEOPT" */
#define NBD_REP_MAGIC UINT64_C(0x0003e889045565a9)

/* proto.md, Handshake flags, of the server, and Client flags */
enum nbd_handshake_flag {
  NBD_FLAG_FIXED_NEWSTYLE = 1 << 0,
  NBD_FLAG_NO_ZEROES = 1 << 1,
  NBD_FLAG_C_FIXED_NEWSTYLE = 1 << 0,
  NBD_FLAG_C_NO_ZEROES = 1 << 1
};

/* proto.md, Option types.  4 (PEEK_EXPORT) was withdrawn; 5 (STARTTLS) is
 * answered as an unknown option. */
enum nbd_opt {
  NBD_OPT_EXPORT_NAME = 1,
  NBD_OPT_ABORT = 2,
  NBD_OPT_LIST = 3,
  NBD_OPT_INFO = 6,
  NBD_OPT_GO = 7,
  NBD_OPT_STRUCTURED_REPLY = 8,
  NBD_OPT_LIST_META_CONTEXT = 9,
  NBD_OPT_SET_META_CONTEXT = 10,
  NBD_OPT_EXTENDED_HEADERS = 11
};

/* proto.md, Option reply types */
enum nbd_rep {
  NBD_REP_ACK = 1,
  NBD_REP_SERVER = 2,
  NBD_REP_INFO = 3,
  NBD_REP_META_CONTEXT = 4
};

/* proto.md, Option reply types, errors: bit 31 is set, which an enum of C99
 * need not be able to hold. */
#define NBD_REP_ERR_UNSUP 0x80000001u
#define NBD_REP_ERR_INVALID 0x80000003u
#define NBD_REP_ERR_UNKNOWN 0x80000006u
#define NBD_REP_ERR_BLOCK_SIZE_REQD 0x80000008u
#define NBD_REP_ERR_TOO_BIG 0x80000009u
#define NBD_REP_ERR_EXT_HEADER_REQD 0x8000000au

/* proto.md, NBD_OPT_INFO and NBD_OPT_GO: types of information */
enum nbd_info {
  NBD_INFO_EXPORT = 0,
  NBD_INFO_NAME = 1,
  NBD_INFO_DESCRIPTION = 2,
  NBD_INFO_BLOCK_SIZE = 3
};

/* proto.md, Transmission flags */
enum nbd_transmission_flag {
  NBD_FLAG_HAS_FLAGS = 1 << 0,
  NBD_FLAG_READ_ONLY = 1 << 1,
  NBD_FLAG_SEND_FLUSH = 1 << 2,
  NBD_FLAG_SEND_FUA = 1 << 3,
  NBD_FLAG_ROTATIONAL = 1 << 4,
  NBD_FLAG_SEND_TRIM = 1 << 5,
  NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6,
  NBD_FLAG_SEND_DF = 1 << 7,
  NBD_FLAG_CAN_MULTI_CONN = 1 << 8,
  NBD_FLAG_SEND_CACHE = 1 << 10,
  NBD_FLAG_SEND_FAST_ZERO = 1 << 11,
  NBD_FLAG_BLOCK_STATUS_PAYLOAD = 1 << 12
};

/* proto.md, Transmission phase: first word of a request or reply */
enum nbd_magic {
  NBD_REQUEST_MAGIC = 0x25609513,
  NBD_EXTENDED_REQUEST_MAGIC = 0x21e41c71,
  NBD_SIMPLE_REPLY_MAGIC = 0x67446698,
  NBD_STRUCTURED_REPLY_MAGIC = 0x668e33ef,
  NBD_EXTENDED_REPLY_MAGIC = 0x6e8a278c
};

/* proto.md, Request types */
enum nbd_cmd {
  NBD_CMD_READ = 0,
  NBD_CMD_WRITE = 1,
  NBD_CMD_DISC = 2,
  NBD_CMD_FLUSH = 3,
  NBD_CMD_TRIM = 4,
  NBD_CMD_CACHE = 5,
  NBD_CMD_WRITE_ZEROES = 6,
  NBD_CMD_BLOCK_STATUS = 7
};

/* proto.md, Command flags */
enum nbd_cmd_flag {
  NBD_CMD_FLAG_FUA = 1 << 0,
  NBD_CMD_FLAG_NO_HOLE = 1 << 1,
  NBD_CMD_FLAG_DF = 1 << 2,
  NBD_CMD_FLAG_REQ_ONE = 1 << 3,
  NBD_CMD_FLAG_FAST_ZERO = 1 << 4,
  NBD_CMD_FLAG_PAYLOAD_LEN = 1 << 5
};

/* A backend's flags are the client's, bit for bit: ex_execute masks them. */
STATIC_ASSERT(same_fua, NBDSERVE_CMD_FUA == NBD_CMD_FLAG_FUA);
STATIC_ASSERT(same_no_hole, NBDSERVE_CMD_NO_HOLE == NBD_CMD_FLAG_NO_HOLE);
STATIC_ASSERT(same_req_one, NBDSERVE_CMD_REQ_ONE == NBD_CMD_FLAG_REQ_ONE);
STATIC_ASSERT(same_fast_zero, NBDSERVE_CMD_FAST_ZERO == NBD_CMD_FLAG_FAST_ZERO);

/* proto.md, Structured reply flags */
enum nbd_reply_flag {
  NBD_REPLY_FLAG_DONE = 1 << 0
};

/* proto.md, Structured reply types; errors have bit 15 set */
enum nbd_reply_type {
  NBD_REPLY_TYPE_NONE = 0,
  NBD_REPLY_TYPE_OFFSET_DATA = 1,
  NBD_REPLY_TYPE_OFFSET_HOLE = 2,
  NBD_REPLY_TYPE_BLOCK_STATUS = 5,
  NBD_REPLY_TYPE_BLOCK_STATUS_EXT = 6,
  NBD_REPLY_TYPE_ERROR = (1 << 15) + 1,
  NBD_REPLY_TYPE_ERROR_OFFSET = (1 << 15) + 2
};

/* proto.md, Error values */
enum nbd_error {
  NBD_EPERM = 1,
  NBD_EIO = 5,
  NBD_ENOMEM = 12,
  NBD_EINVAL = 22,
  NBD_ENOSPC = 28,
  NBD_EOVERFLOW = 75,
  NBD_ENOTSUP = 95,
  NBD_ESHUTDOWN = 108
};

/* ---- Sizes and limits --------------------------------------------------- */

enum {
  WIRE_STRING_MAX = 4096, /* bytes of a name or text (proto.md, Values) */
  WIRE_HELLO_LEN = 18,
  WIRE_CLIENT_FLAGS_LEN = 4,
  WIRE_OPTION_LEN = 16,
  WIRE_OPTION_REPLY_LEN = 20,
  WIRE_EXPORT_NAME_LEN = 10,  /* reply to NBD_OPT_EXPORT_NAME, and... */
  WIRE_EXPORT_NAME_PAD = 124, /* ...zeroes behind it, unless declined */
  WIRE_INFO_EXPORT_LEN = 12,
  WIRE_INFO_BLOCK_SIZE_LEN = 14,
  WIRE_REQUEST_LEN = 28,
  WIRE_EXT_REQUEST_LEN = 32,
  WIRE_SIMPLE_REPLY_LEN = 16,
  WIRE_CHUNK_LEN = 20,     /* head of a chunk of a structured reply */
  WIRE_EXT_CHUNK_LEN = 32, /* the same with extended headers */
  WIRE_OFFSET_LEN = 8,     /* in front of a chunk's data */
  WIRE_HOLE_LEN = 12,      /* the whole payload of a hole */
  WIRE_ERROR_LEN = 6       /* in front of an error's text */
};

/* The form of requests and replies that a client has negotiated. */
enum wire_mode {
  MODE_SIMPLE,     /* compact requests, simple replies */
  MODE_STRUCTURED, /* compact requests; READs and errors come in chunks */
  MODE_EXTENDED    /* extended requests; all replies are extended chunks */
};

/* ---- Handshake messages (proto.md, Newstyle negotiation, Option types)
 *
 *   hello           OFFSET SIZE FIELD          the client's flags come back
 *                        0    8 NBD_INIT_MAGIC
 *                        8    8 NBD_OPTION_MAGIC
 *                       16    2 enum nbd_handshake_flag
 *   option               0    8 NBD_OPTION_MAGIC
 *                        8    4 enum nbd_opt
 *                       12    4 length of the data behind it
 *   reply to one         0    8 NBD_REP_MAGIC
 *                        8    4 the option that is answered
 *                       12    4 enum nbd_rep, or NBD_REP_ERR_...
 *                       16    4 length of the data behind it
 */

/* ---- Requests (proto.md, Request message, Extended request message)
 *
 *   request         OFFSET SIZE FIELD          extended request
 *                        0    4 magic                   0    4 magic
 *                        4    2 command flags           4    2 command flags
 *                        6    2 enum nbd_cmd            6    2 enum nbd_cmd
 *                        8    8 cookie                  8    8 cookie
 *                       16    8 offset                 16    8 offset
 *                       24    4 length                 24    8 length
 *
 *   NBD_CMD_BLOCK_STATUS with NBD_CMD_FLAG_PAYLOAD_LEN: length is that of this
 *   payload           0    8 bytes to report on
 *                     8    4 id of a context, and so on
 */

/* The life of a request:
 *
 *   state         set by                              what comes next
 *   TODO          wire_get_request                    TO_FLUSH, HANDED_OVER,
 *                                                     DONE
 *   TO_FLUSH      tx_next_request, for a FLUSH;       HANDED_OVER, DONE
 *                 tx_executed, for a write with FUA
 *   HANDED_OVER   tx_hand_over: a worker has a copy,  nothing: this one is dead
 *                 in the state that this one had
 *   DONE          tx_refuse; tx_next_request, if      it is answered
 *                 there is nothing to do; tx_executed;
 *                 tx_flush
 *
 * Until it is HANDED_OVER only the client's thread touches a request; the copy
 * belongs to the worker that takes it. */
enum req_state {
  REQ_TODO,        /* is to be executed */
  REQ_TO_FLUSH,    /* a FLUSH, or a write with FUA that is written: owes a
                      flush */
  REQ_HANDED_OVER, /* a worker's copy goes on from here */
  REQ_DONE         /* err is final */
};

/* One request of a client, or a piece of a long one. */
struct nbdserve_req {
  /* -- the client's, fixed */
  uint16_t type;       /* enum nbd_cmd */
  uint16_t flags;      /* enum nbd_cmd_flag */
  enum wire_mode mode; /* the form of the reply */
  uint64_t cookie;     /* goes back as it came */
  uint64_t client_off; /* offset of the client's request */
  uint64_t off;        /* offset of this piece; the same if it is whole */
  uint64_t len;        /* bytes of this piece */
  /* -- its data */
  unsigned char *buf; /* READ: room for it, behind room for the reply's head;
                         WRITE: it; BLOCK_STATUS: extents as they are sent */
  size_t status_len;  /* BLOCK_STATUS: bytes at buf */
  void *owned;        /* the memory that buf lies in, which is freed with the
                         request; NULL: it is the client's thread's */
  /* -- the outcome */
  enum req_state state;
  int err;             /* 0 or -errno */
  const char *refused; /* why tx_validate refused it, else NULL */
  int all_zero;        /* READ: only zeroes were read, so a hole may be sent */
  int more_chunks;     /* another chunk of this reply follows */
  int err_has_off;     /* err_off is valid */
  uint64_t err_off;    /* where in the export err happened */
  struct nbdserve_req *next; /* in a list of requests that are answered, or
                                wait for a worker */
};

/* Moves a request on in the table above. */
static void req_set_state(struct nbdserve_req *r, enum req_state to) {
  assert(r->state == REQ_TODO || r->state == REQ_TO_FLUSH);
  assert(to > r->state);
  r->state = to;
}

/* How long the head of a request is. */
static size_t wire_request_len(enum wire_mode mode) {
  return mode == MODE_EXTENDED ? WIRE_EXT_REQUEST_LEN : WIRE_REQUEST_LEN;
}

/* Reads the head of a request: wire_request_len bytes, of which the caller has
 * seen the magic. */
static struct nbdserve_req wire_get_request(const unsigned char *p,
                                            enum wire_mode mode) {
  struct nbdserve_req r = {.mode = mode,
                           .flags = u_get16(p + 4),
                           .type = u_get16(p + 6),
                           .cookie = u_get64(p + 8),
                           .client_off = u_get64(p + 16)};
  r.off = r.client_off;
  r.len = mode == MODE_EXTENDED ? u_get64(p + 24) : u_get32(p + 24);
  return r;
}

/* ---- Replies (proto.md, Simple reply message, Structured reply chunk message,
 * Extended reply chunk message, Structured reply types)
 *
 *   simple reply    OFFSET SIZE FIELD          a READ's data follows
 *                        0    4 magic
 *                        4    4 enum nbd_error, 0: done
 *                        8    8 cookie
 *   chunk                0    4 magic          extended chunk
 *                        4    2 enum nbd_reply_flag     4    2 the same
 *                        6    2 enum nbd_reply_type     6    2 the same
 *                        8    8 cookie                  8    8 cookie
 *                       16    4 length                 16    8 offset of the
 *                                                              request
 *                                                      24    8 length
 *   payload of OFFSET_DATA      0    8 offset, and the data
 *   payload of OFFSET_HOLE      0    8 offset
 *                               8    4 length
 *   payload of ERROR            0    4 enum nbd_error
 *                               4    2 length of the text
 *                               6      the text
 *   payload of ERROR_OFFSET     the same, and behind the text 8 bytes: offset
 *   payload of BLOCK_STATUS     0    4 id of the context
 *                               4    4 length of an extent
 *                               8    4 its status, and so on
 *   of BLOCK_STATUS_EXT         0    4 id of the context
 *                               4    4 number of extents
 *                               8    8 length of an extent
 *                              16    8 its status, and so on
 */

enum {
  WIRE_CONTEXT_ID = 1, /* of base:allocation, which is the only context */
  WIRE_STATUS_PAYLOAD_LEN = 12, /* of a request for that one context */
  WIRE_STATUS_LEN = 4,          /* in front of the extents of BLOCK_STATUS */
  WIRE_EXTENT_LEN = 8,
  WIRE_EXT_STATUS_LEN = 8, /* the same of BLOCK_STATUS_EXT */
  WIRE_EXT_EXTENT_LEN = 16
};

/* How many bytes to report on the payload of a BLOCK_STATUS asks for; 0 if it
 * is none, or asks for other contexts than ours. */
static uint64_t wire_get_status_len(const unsigned char *p, uint64_t len) {
  int is_ours =
      len == WIRE_STATUS_PAYLOAD_LEN && u_get32(p + 8) == WIRE_CONTEXT_ID;
  return is_ours ? u_get64(p) : 0;
}

/* Writes a simple reply.  Returns its length. */
static size_t wire_put_simple(unsigned char *p, uint32_t error,
                              uint64_t cookie) {
  u_put32(p, NBD_SIMPLE_REPLY_MAGIC);
  u_put32(p + 4, error);
  u_put64(p + 8, cookie);
  return WIRE_SIMPLE_REPLY_LEN;
}

/* How long the head of a chunk is. */
static size_t wire_chunk_len(enum wire_mode mode) {
  assert(mode != MODE_SIMPLE);
  return mode == MODE_EXTENDED ? WIRE_EXT_CHUNK_LEN : WIRE_CHUNK_LEN;
}

/* How long the head of a READ's reply is: all that stands before its data. */
static size_t wire_read_head_len(enum wire_mode mode) {
  return mode == MODE_SIMPLE ? WIRE_SIMPLE_REPLY_LEN
                             : wire_chunk_len(mode) + WIRE_OFFSET_LEN;
}

/* Writes the head of a chunk of a request's reply, with len bytes of payload:
 * wire_chunk_len bytes. */
static void wire_put_chunk(unsigned char *p, const struct nbdserve_req *r,
                           enum nbd_reply_type type, uint64_t len) {
  int extended = r->mode == MODE_EXTENDED;
  int is_last = r->err || !r->more_chunks;
  assert(r->mode != MODE_SIMPLE && (extended || len <= UINT32_MAX));
  u_put32(p, extended ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC);
  u_put16(p + 4, is_last ? NBD_REPLY_FLAG_DONE : 0);
  u_put16(p + 6, type);
  u_put64(p + 8, r->cookie);
  if (extended) {
    u_put64(p + 16, r->client_off);
    u_put64(p + 24, len);
  } else {
    u_put32(p + 16, (uint32_t)len);
  }
}

/* ---- Commands and errors ------------------------------------------------ */

/* What is true of each command: validation and dispatch read it here. */
static const struct wire_cmd {
  const char *name;
  uint16_t flags;      /* that it may carry, besides FUA, which any may */
  uint16_t exposed_by; /* transmission flag that offers it; 0: always there */
  uint8_t writes;      /* refused on a read-only export */
  uint8_t has_data;    /* moves data: the request has a buffer of len bytes */
  int err_beyond;      /* -errno of a range beyond the end (proto.md); 0:
                          offset and length mean nothing */
} wire_cmds[] = {
    /* clang-format off */
    [NBD_CMD_READ] = {.name = "NBD_CMD_READ", .flags = NBD_CMD_FLAG_DF,
        .has_data = 1, .err_beyond = -EINVAL},
    [NBD_CMD_WRITE] = {.name = "NBD_CMD_WRITE",
        .flags = NBD_CMD_FLAG_PAYLOAD_LEN, .writes = 1,
        .has_data = 1, .err_beyond = -ENOSPC},
    [NBD_CMD_DISC] = {.name = "NBD_CMD_DISC"},
    [NBD_CMD_FLUSH] = {.name = "NBD_CMD_FLUSH",
        .exposed_by = NBD_FLAG_SEND_FLUSH},
    [NBD_CMD_TRIM] = {.name = "NBD_CMD_TRIM",
        .exposed_by = NBD_FLAG_SEND_TRIM, .writes = 1, .err_beyond = -EINVAL},
    [NBD_CMD_CACHE] = {.name = "NBD_CMD_CACHE",
        .exposed_by = NBD_FLAG_SEND_CACHE, .err_beyond = -EINVAL},
    [NBD_CMD_WRITE_ZEROES] = {.name = "NBD_CMD_WRITE_ZEROES",
        .flags = NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
        .exposed_by = NBD_FLAG_SEND_WRITE_ZEROES, .writes = 1,
        .err_beyond = -ENOSPC},
    [NBD_CMD_BLOCK_STATUS] = {.name = "NBD_CMD_BLOCK_STATUS",
        .flags = NBD_CMD_FLAG_REQ_ONE | NBD_CMD_FLAG_PAYLOAD_LEN,
        .err_beyond = -EINVAL},
    /* clang-format on */
};

/* What is known of a command, or NULL: its number comes from a client. */
static const struct wire_cmd *wire_cmd(unsigned type) {
  return type < COUNT_OF(wire_cmds) ? &wire_cmds[type] : NULL;
}

/* Is it a READ or a WRITE that moves at least one byte? */
static int req_moves_data(const struct nbdserve_req *r) {
  const struct wire_cmd *cmd = wire_cmd(r->type);
  return cmd && cmd->has_data && r->len > 0;
}

/* The protocol's number for a -errno value: no other number is ever sent. */
static uint32_t wire_error(int err) {
  assert(err <= 0);
  static const struct {
    int host;
    enum nbd_error nbd;
  } errors[] = {
      {EPERM, NBD_EPERM},         {EACCES, NBD_EPERM},
      {EROFS, NBD_EPERM},         {ENOMEM, NBD_ENOMEM},
      {EINVAL, NBD_EINVAL},       {ENOSPC, NBD_ENOSPC},
      {EDQUOT, NBD_ENOSPC},       {EFBIG, NBD_ENOSPC},
      {EOVERFLOW, NBD_EOVERFLOW}, {ENOTSUP, NBD_ENOTSUP},
      {EOPNOTSUPP, NBD_ENOTSUP}, /* another number on some systems */
      {ESHUTDOWN, NBD_ESHUTDOWN},
  };
  if (!err) return 0;
  for (size_t i = 0; i < COUNT_OF(errors); i++)
    if (errors[i].host == -err) return errors[i].nbd;
  return NBD_EIO;
}

/* ==== [6] SOCKET I/O (io_) ===============================================
 * Whole messages over sockets and pipes.
 *
 * (I1) Every wait for a peer ends: by the peer, by a time limit, or because the
 *      server stops.  Only a client that owes nothing may be idle for ever.
 * (I2) What has begun has a time in total, which grows with its size and never
 *      starts anew: stall_ms for the head of a request, and for each MiB, or
 *      part of one, of its data and of replies.  A peer that takes or gives one
 *      byte at a time gains nothing by it.
 * (I3) Stopping: what has arrived is still received, but no request behind it.
 *      There is one grace for the whole server, not one for each wait.
 *
 * Three kinds of connections differ in how they wait and how they learn that
 * the server stops:
 *
 *   kind            waits for a    for the rest   is told to stop by
 *                   request in     of one in
 *   unix socket of  recv()         recv()         shutdown(SHUT_RD) in
 *   a listener                                    srv_finish
 *   TCP socket of   poll()         recv()         the stop pipe: with SHUT_RD,
 *   a listener                                    what a peer still sends would
 *                                                 reset the connection
 *   nbdserve_serve  poll()         poll()         the stop pipe: it is the
 *                                                 caller's socket, or a pipe
 *
 * With NO_THREADS all are of the last kind: nobody could shut one down.  During
 * the handshake all of them wait in poll(), for the deadline.  Sending never
 * waits in the kernel but in poll(), for the time in total. */

enum {
  IO_GRACE_MS = 5000, /* from nbdserve_stop on, for what is under way */
  IO_UNIT = 1 << 20,  /* bytes that must move within stall_ms */
  IO_TRIES = 8        /* within stall_ms: see io_wait_ready */
};

/* How a server tells its connections that it stops. */
struct io_stop {
  int pipe[2];            /* fixed; readable from nbdserve_stop on, for good */
  struct os_monitor lock; /* guards grace_end */
  int64_t grace_end;      /* in os_now_ms; 0: nobody has seen the stop so far */
};

struct io {
  /* -- fixed */
  int in;               /* socket or pipe that the client's bytes come from */
  int out;              /* the same, or another one, that replies go to */
  struct io_stop *stop; /* the server's */
  int64_t stall_ms;     /* (I2) */
  int polls_requests;   /* wait in poll() for a request, not in recv() */
  int polls_payloads;   /* the same for the rest of what has begun */
  /* -- written in the handshake, then 0 */
  int64_t deadline; /* in os_now_ms; 0: none */
  /* -- the client's thread only */
  int stopping;        /* this thread has seen that the server stops */
  size_t arrived_left; /* bytes that had arrived by then and are still to be
                          received */
  int at_end;          /* the peer has closed its side */
};

/* When the grace is over: the first who asks starts it, for all (I3). */
static int64_t io_grace_end(struct io_stop *stop) {
  os_lock(&stop->lock);
  if (!stop->grace_end) stop->grace_end = os_now_ms() + IO_GRACE_MS;
  int64_t end = stop->grace_end;
  os_unlock(&stop->lock);
  assert(end > 0);
  return end;
}

/* By when n bytes that are asked for now must have moved (I2), (H3). */
static int64_t io_until(const struct io *io, size_t n) {
  assert(io->stall_ms > 0);
  if (io->deadline) return io->deadline;
  int64_t units = (int64_t)((n + IO_UNIT - 1) / IO_UNIT);
  return os_now_ms() + io->stall_ms * (units > 0 ? units : 1);
}

/* poll()'s timeout until a time in os_now_ms, at least 0. */
static int io_timeout(int64_t until) {
  int64_t left = until - os_now_ms();
  if (left < 0) return 0;
  return left > INT_MAX ? INT_MAX : (int)left;
}

/* Waits until there is something to receive.  -ETIMEDOUT: not until the time
 * `until` (0: without limit).  -ESHUTDOWN: all that had arrived when the server
 * stopped has been taken. */
static int io_wait_input(struct io *io, int64_t until) {
  /* Of a pipe for replies poll() says when nobody reads it any more. */
  int replies = io->out == io->in ? -1 : io->out;
  struct pollfd p[3] = {{.fd = io->in, .events = POLLIN},
                        {.fd = io->stop->pipe[0], .events = POLLIN},
                        {.fd = replies, .events = 0}};
  while (!io->stopping) {
    int timeout = until ? io_timeout(until) : -1;
    if (timeout == 0) return -ETIMEDOUT; /* even if there is something */
    int r = poll(p, 3, timeout);
    if (r < 0 && errno != EINTR) return -errno;
    if (r <= 0) continue;
    if (p[2].revents & POLLERR) return -EPIPE;
    if (!p[1].revents) return 0;
    int arrived = 0; /* until now: all that is still taken (I3) */
    if (ioctl(io->in, FIONREAD, &arrived) == 0 && arrived > 0)
      io->arrived_left = (size_t)arrived;
    io->stopping = 1;
  }
  return io->arrived_left > 0 ? 0 : -ESHUTDOWN;
}

/* Waits until a descriptor is ready for the events, or it is worth a try.
 * -ETIMEDOUT: not until the time `until`, or the end of the grace.
 *
 * Some systems call a socket ready to send only when most of its buffer is
 * empty, which can be megabytes.  So that a peer which takes enough in time is
 * not cut off meanwhile, the wait ends now and then without that. */
static int io_wait_ready(const struct io *io, int fd, short events,
                         int64_t until) {
  struct pollfd p[2] = {{.fd = fd, .events = events},
                        {.fd = io->stop->pipe[0], .events = POLLIN}};
  int slice = (int)u_min((uint64_t)io->stall_ms / IO_TRIES + 1, INT_MAX);
  for (;;) {
    int timeout = io_timeout(until);
    if (timeout == 0) return -ETIMEDOUT; /* even if it is ready */
    int r = poll(p, 2, timeout < slice ? timeout : slice);
    if (r < 0 && errno != EINTR) return -errno;
    if (r < 0) continue;
    if (!p[1].revents) return 0;
    p[1].fd = -1; /* seen: poll skips a negative one */
    int64_t end = io_grace_end(io->stop);
    if (end < until) until = end;
  }
}

/* Receives what is there, up to len bytes, once poll() has said that there is
 * something, or waits for it in recv(); MSG_WAITALL in flags waits for all.
 * Returns their number, 0 at the end of the stream, -EAGAIN when a socket's own
 * timeout is over, or -errno. */
static ssize_t io_recv_now(struct io *io, void *buf, size_t len, int flags) {
  ssize_t n;
  if (io->stopping) len = (size_t)u_min(len, io->arrived_left);
  assert(len > 0);
  do {
    n = recv(io->in, buf, len, flags);
    if (n < 0 && errno == ENOTSOCK) n = read(io->in, buf, len);
  } while (n < 0 && errno == EINTR);
  if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
    io->arrived_left = 0; /* another reader of this descriptor was faster */
    return -EAGAIN;
  }
  if (n < 0) return -errno;
  assert((size_t)n <= len);
  if (io->stopping) io->arrived_left -= (size_t)n;
  if (n == 0) io->at_end = 1;
  return n;
}

/* Receives at least `least` bytes, and up to `most`: if these are the same, the
 * data of something, else requests, of which the next one lacks that many
 * bytes.  Returns their number.  -EPIPE: the stream ends before.  -ETIMEDOUT:
 * they take too long in total (I2), or an idle client says nothing for
 * stall_ms.  Or -errno. */
static ssize_t io_recv(struct io *io, unsigned char *p, size_t least,
                       size_t most) {
  int is_data = least == most;
  int polls = io->polls_payloads;
  if (!is_data) polls = io->polls_requests || least > 1;
  if (io->deadline) polls = 1;
  int waiting = is_data ? MSG_WAITALL : 0;
  int64_t until = io_until(io, least);
  size_t got = 0;
  assert(least > 0 && least <= most);
  while (got < least) {
    int err = polls || io->stopping ? io_wait_input(io, until) : 0;
    if (err) return err;
    ssize_t n =
        io_recv_now(io, p + got, most - got, polls ? MSG_DONTWAIT : waiting);
    if (n == 0) return -EPIPE;
    if (n < 0 && n != -EAGAIN) return n;
    if (n > 0) got += (size_t)n;
    if (got < least && os_now_ms() >= until) return -ETIMEDOUT;
  }
  return (ssize_t)got;
}

/* Receives exactly len bytes.  0, or -errno as io_recv. */
static int io_recv_all(struct io *io, unsigned char *p, size_t len) {
  ssize_t n = io_recv(io, p, len, len);
  return n < 0 ? (int)n : 0;
}

/* Writes to a pipe what it takes without waiting: PIPE_BUF bytes, if poll()
 * says that it is ready.  Bytes written, or -1 with errno. */
static ssize_t io_write_pipe(int fd, const struct iovec *v) {
  struct pollfd p = {.fd = fd, .events = POLLOUT};
  if (poll(&p, 1, 0) <= 0) {
    errno = EAGAIN;
    return -1;
  }
  return write(fd, v->iov_base, (size_t)u_min(v->iov_len, PIPE_BUF));
}

/* Sends some of v[0..n) without waiting.  Bytes sent, or -errno. */
static ssize_t io_send_now(const struct io *io, struct iovec *v, int n) {
  struct msghdr m = {.msg_iov = v, .msg_iovlen = (unsigned)n};
  ssize_t done = sendmsg(io->out, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
  if (done < 0 && errno == ENOTSOCK) done = io_write_pipe(io->out, v);
  if (done >= 0) return done;
  return errno == EWOULDBLOCK ? -EAGAIN : -errno;
}

/* Sends all of v[0..n), which it uses up.  0, -ETIMEDOUT when the peer takes
 * too long in total (I2), or -errno. */
static int io_send(const struct io *io, struct iovec *v, int n) {
  int64_t until = 0; /* fixed when the peer first makes us wait */
  size_t total = 0;
  assert(n > 0);
  for (int i = 0; i < n; i++)
    total += v[i].iov_len;
  while (n > 0) {
    ssize_t done = io_send_now(io, v, n);
    if (done >= 0) {
      os_advance(&v, &n, (size_t)done);
      if (until && n > 0 && os_now_ms() >= until) return -ETIMEDOUT;
      continue;
    }
    if (done == -EINTR) continue;
    if (done != -EAGAIN) return (int)done;
    if (!until) until = io_until(io, total);
    int err = io_wait_ready(io, io->out, POLLOUT, until);
    if (err) return err;
  }
  return 0;
}

/* Ends a TCP connection so that the replies sent so far arrive: closing it
 * while the peer still sends would reset it, and a reset overtakes data.  So
 * the peer is told that nothing more comes, and what it sends is thrown away
 * until it closes its side or the grace is over. */
static void io_linger(struct io *io) {
  char waste[4096];
  int64_t until = os_now_ms() + IO_GRACE_MS;
  if (io->at_end || shutdown(io->out, SHUT_WR) < 0) return;
  while (io_wait_ready(io, io->in, POLLIN, until) == 0) {
    ssize_t n = recv(io->in, waste, sizeof waste, MSG_DONTWAIT);
    if (n == 0) return;
    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
      return;
  }
}

/* ==== [7] EXPORT (ex_) ===================================================
 * What is served, how a name finds it, and how one request is done on it.
 *
 * (E1) An added export stays where it is until nbdserve_free; one that the find
 *      callback made belongs to the client that asked for it.
 * (E2) The requests that arrive here have passed tx_validate: range, alignment
 *      and flags hold, and are asserted, not checked again.
 * (E3) A flush covers what was written before it was asked for, by whichever
 *      client: all clients of an added export share its struct ex.  Those who
 *      ask while a flush is running all get the result of the next one.
 * (E4) A host's function is called with no lock held but ex.serial (ops->size:
 *      nbdserve.lock), and nothing that it returns is believed: see
 *      ex_believe. */

struct nbdserve;

/* ---- Exports and the state of a server ----------------------------------- */

enum {
  EX_ALL_FLAGS = NBDSERVE_EXPORT_READONLY | NBDSERVE_EXPORT_SERIAL |
                 NBDSERVE_EXPORT_MULTI_CONN | NBDSERVE_EXPORT_ROTATIONAL |
                 NBDSERVE_EXPORT_NATIVE_FUA | NBDSERVE_EXPORT_FALLBACK |
                 NBDSERVE_EXPORT_WRITETHROUGH | NBDSERVE_EXPORT_UNSAFE,
  EX_MAX_MIN_BLOCK = 65536,  /* proto.md, Size constraints */
  EX_DEFAULT_BLOCK = 4096,   /* the same: what clients take for granted, */
  EX_DEFAULT_MAX = 32 << 20, /* and here */
  EX_ZERO_STEP = 1 << 20,    /* bytes of zeroes that are written at a time */
  EX_EXTENTS = 2048,         /* in one reply, at most: 32 KiB */
  EX_MAX_ERRNO = 4095,       /* no system has a larger one */
  EX_LIES_LOGGED = 10,       /* messages about wrong results: no flood */
  SRV_LISTENERS = 32         /* and one more, since localhost is two */
};

struct ex {
  /* -- fixed, but for pub.size, which server->lock guards */
  struct nbdserve_export pub; /* as the host described it, defaults filled in */
  struct nbdserve *server;
  int from_callback; /* (E1) */
  struct ex *next;   /* of those that were added */
  /* -- locks */
  struct os_monitor serial; /* one call at a time, with SERIAL */
  struct os_monitor lock;   /* guards the rest; woken when a flush has ended */
  uint64_t flushes_begun;   /* their number so far: the last one's number */
  uint64_t flush_failed;    /* number of the last one that failed; 0: none */
  int flush_err;            /* the error of that one */
  int flush_runs;           /* the last one has not returned */
  char strings[];           /* name and description, each with its NUL */
};

struct srv_listener {
  int fd;
  int is_unix;    /* text is the path of a socket that is ours to remove... */
  struct stat st; /* ...if it still is this one */
  char text[128]; /* that path, HOST:PORT, or "" */
};

/* A server.  struct conn is in [8]. */
struct nbdserve {
  /* -- fixed after nbdserve_new (the command sets find and list later) */
  struct nbdserve_config config; /* defaults filled in */
  struct io_stop stop;
  int wake[2];    /* pipe: nbdserve_wake was called, and nothing else */
  int noticed[2]; /* pipe: a client has left; nbdserve_run looks around */
  /* -- the thread that calls nbdserve_run */
  struct srv_listener listeners[SRV_LISTENERS + 1];
  int nlisteners;
  int64_t accept_after;    /* in os_now_ms: the last accept() failed */
  int64_t tell_full_after; /* when to say again that clients have to wait */
  int first_listener;      /* whom to look at first: each in turn */
  int finished;            /* srv_finish has done its steps */
  /* -- guarded by lock, in which nobody waits */
  struct os_monitor lock;
  struct ex *exports; /* (E1): the list only grows, at its end */
  struct ex **last_export;
  struct conn *conns; /* clients that are being served */
  unsigned nconns;
  unsigned nlies;     /* wrong results of the host's functions so far */
  int64_t idle_since; /* when the last client left; 0: never run */
  struct nbdserve_stats totals; /* of the clients that have left; all flushes */
};

/* ---- The layer around the host's functions ------------------------------- */

/* Says that a function of the host's has given what it must not.  where: the
 * name of the export, or "" for a function of the config. */
static void ex_log_lie(struct nbdserve *s, const char *where,
                       const char *function, const char *what) {
  os_lock(&s->lock);
  unsigned n = ++s->nlies;
  os_unlock(&s->lock);
  if (n <= EX_LIES_LOGGED)
    u_log(&s->config, NBDSERVE_LOG_ERROR,
          "export '%s': the host's %s %s; taken as EIO%s", where, function,
          what, n == EX_LIES_LOGGED ? "; no more of these are logged" : "");
}

/* What a function of the host's has returned, if that is 0 or a -errno value.
 * Any other number is no reason to end the host's process, nor to tell a client
 * something wrong: it becomes -EIO. */
static int ex_believe(struct nbdserve *s, const char *where,
                      const char *function, int r) {
  char what[48];
  if (r <= 0 && r >= -EX_MAX_ERRNO) return r;
  snprintf(what, sizeof what, "returned %d, no -errno value", r);
  ex_log_lie(s, where, function, what);
  return -EIO;
}

/* Asks the host's `before` whether a request shall fail.  0 or -errno. */
static int ex_ask_before(struct ex *ex, const struct nbdserve_req *r) {
  const struct nbdserve_config *k = &ex->server->config;
  if (!k->before) return 0;
  return ex_believe(ex->server, ex->pub.name, "before",
                    k->before(k->ctx, r->type, r->off, r->len));
}

/* ---- Making, finding, freeing -------------------------------------------- */

/* Frees the export and, through close, the backend's context. */
static void ex_free(struct ex *ex) {
  assert(!ex->flush_runs);
  if (ex->pub.ops->close) ex->pub.ops->close(ex->pub.ctx);
  os_monitor_free(&ex->lock);
  os_monitor_free(&ex->serial);
  NBDSERVE_FREE(ex);
}

/* Fills in what the host has left at 0.  Returns what is wrong with the export
 * then, or NULL. */
static const char *ex_complete(struct nbdserve_export *e) {
  if (!e->name) e->name = "";
  if (!e->description) e->description = "";
  if (!e->min_block) e->min_block = 1;
  if (!e->preferred_block)
    e->preferred_block =
        e->min_block > EX_DEFAULT_BLOCK ? e->min_block : EX_DEFAULT_BLOCK;
  if (!e->max_request)
    e->max_request = (uint32_t)u_min(EX_DEFAULT_MAX, NBDSERVE_MAX_REQUEST);
  if (!e->ops || !e->ops->read) return "no read function";
  if (!e->ops->write) e->flags |= NBDSERVE_EXPORT_READONLY;
  if (e->size > INT64_MAX) return "size above INT64_MAX";
  if (e->flags & ~(uint32_t)EX_ALL_FLAGS) return "unknown flags";
  if (strlen(e->name) > WIRE_STRING_MAX) return "name too long";
  if (strlen(e->description) > WIRE_STRING_MAX) return "description too long";
  if (!u_is_power_of_2(e->min_block) || e->min_block > EX_MAX_MIN_BLOCK)
    return "min_block is no power of two up to 65536";
  if (!u_is_power_of_2(e->preferred_block) || e->preferred_block < 512 ||
      e->preferred_block < e->min_block)
    return "preferred_block is no power of two, or below 512 or min_block";
  if (e->max_request < e->preferred_block ||
      e->max_request > NBDSERVE_MAX_REQUEST)
    return "max_request is below preferred_block or too large";
  return NULL;
}

/* Makes an export of what the host describes.  On success it owns from->ctx.
 * -EINVAL: not a possible description, -ENOMEM: ctx stays the caller's. */
static int ex_new(struct nbdserve *s, const struct nbdserve_export *from,
                  struct ex **out) {
  struct nbdserve_export e = *from;
  if (ex_complete(&e)) return -EINVAL;
  size_t name_size = strlen(e.name) + 1;
  size_t description_size = strlen(e.description) + 1;
  struct ex *ex = u_zalloc(sizeof *ex + name_size + description_size);
  if (!ex) return -ENOMEM;
  if (os_monitors_init(&ex->serial, &ex->lock)) {
    NBDSERVE_FREE(ex);
    return -ENOMEM;
  }
  assert(e.max_request > 0 && e.min_block <= e.preferred_block);
  e.name = memcpy(ex->strings, e.name, name_size);
  e.description =
      memcpy(ex->strings + name_size, e.description, description_size);
  ex->pub = e;
  ex->server = s;
  assert(ex->pub.ops->read && ex->pub.size <= INT64_MAX && !ex->next);
  *out = ex;
  return 0;
}

/* The added export of that name, or NULL.  The caller holds s->lock. */
static struct ex *ex_by_name(struct nbdserve *s, const char *name) {
  struct ex *ex = s->exports;
  while (ex && strcmp(ex->pub.name, name) != 0)
    ex = ex->next;
  return ex;
}

/* The added export behind that one, or behind NULL the first one; NULL: there
 * is no more.  (E1): they stay, so no lock is needed in between. */
static struct ex *ex_next(struct nbdserve *s, const struct ex *ex) {
  os_lock(&s->lock);
  struct ex *next = ex ? ex->next : s->exports;
  os_unlock(&s->lock);
  return next;
}

/* The added export that serves a name which no other has, or NULL: for the
 * empty name the first one, else one that takes any name.  The caller holds
 * s->lock. */
static struct ex *ex_fallback(struct nbdserve *s, const char *name) {
  struct ex *ex = s->exports;
  if (!*name) return ex;
  while (ex && !(ex->pub.flags & NBDSERVE_EXPORT_FALLBACK))
    ex = ex->next;
  return ex;
}

/* Asks the host's find callback for an export.  -ENOENT: it knows none of that
 * name, or there is no callback; others: what it said, or -EIO if what it gave
 * is not a valid export.  The client owns the export. */
static int ex_from_callback(struct nbdserve *s, const char *name,
                            struct ex **out) {
  const struct nbdserve_config *k = &s->config;
  struct nbdserve_export e = {0};
  if (!k->find) return -ENOENT;
  int err = ex_believe(s, name, "find", k->find(k->ctx, name, &e));
  if (err) return err;
  if (!e.name) e.name = name;
  const char *fault = ex_complete(&e);
  if (fault) ex_log_lie(s, name, "find gave a wrong export:", fault);
  err = fault ? -EIO : ex_new(s, &e, out);
  if (!err)
    (*out)->from_callback = 1;
  else if (e.ops && e.ops->close)
    e.ops->close(e.ctx);
  return err;
}

/* Asks an added export for its size now, and keeps that. */
static int ex_current_size(struct ex *ex, uint64_t *size) {
  struct nbdserve_export *e = &ex->pub;
  os_lock(&ex->server->lock);
  uint64_t now = e->size;
  if (e->ops->size && !ex->from_callback) now = e->ops->size(e->ctx, e->size);
  int is_size = now <= INT64_MAX;
  if (is_size) e->size = now;
  os_unlock(&ex->server->lock);
  if (!is_size) {
    ex_log_lie(ex->server, ex->pub.name, "size",
               "returned more than INT64_MAX");
    return -EIO;
  }
  *size = now - now % e->min_block; /* no request reaches the rest */
  assert(*size <= INT64_MAX && *size % e->min_block == 0);
  return 0;
}

/* Finds the export that a client means, and its size now.  -ENOENT: there is
 * none; others: what the host's callbacks said.  ex_release gives it back. */
static int ex_acquire(struct nbdserve *s, const char *name, struct ex **out,
                      uint64_t *size) {
  os_lock(&s->lock);
  struct ex *ex = ex_by_name(s, name); /* first, one of that very name */
  os_unlock(&s->lock);
  if (!ex) { /* second, what the host knows */
    int err = ex_from_callback(s, name, &ex);
    if (err && err != -ENOENT) return err;
  }
  if (!ex) { /* last, one that takes what no other has */
    os_lock(&s->lock);
    ex = ex_fallback(s, name);
    os_unlock(&s->lock);
  }
  if (!ex) return -ENOENT;
  int err = ex_current_size(ex, size);
  if (err && ex->from_callback) ex_free(ex);
  if (!err) *out = ex;
  return err;
}

/* Gives back what ex_acquire gave; frees it if it was the client's (E1). */
static void ex_release(struct ex *ex) {
  assert(ex);
  if (ex->from_callback) ex_free(ex);
}

/* The transmission flags for a client: each is set exactly when the thing works
 * on this export.  has_allocation: the client has selected base:allocation. */
static unsigned ex_transmission_flags(const struct ex *ex, enum wire_mode mode,
                                      int has_allocation) {
  const struct nbdserve_config *k = &ex->server->config;
  const struct nbdserve_ops *ops = ex->pub.ops;
  int writable = !(ex->pub.flags & NBDSERVE_EXPORT_READONLY);
  unsigned f = 0;
  if (ex->pub.flags & NBDSERVE_EXPORT_ROTATIONAL) f |= NBD_FLAG_ROTATIONAL;
  /* With a single slot a second connection would wait until the first ends. */
  if ((ex->pub.flags & NBDSERVE_EXPORT_MULTI_CONN) && k->max_conn > 1)
    f |= NBD_FLAG_CAN_MULTI_CONN;
  if (ops->cache) f |= NBD_FLAG_SEND_CACHE;
  if (mode != MODE_SIMPLE) f |= NBD_FLAG_SEND_DF;
  if (mode == MODE_EXTENDED && has_allocation)
    f |= NBD_FLAG_BLOCK_STATUS_PAYLOAD;
  if (writable) f |= NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
  if (writable && ops->flush) f |= NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA;
  if (writable && ops->trim) f |= NBD_FLAG_SEND_TRIM;
  f &= ~k->without;
  return f | NBD_FLAG_HAS_FLAGS | (writable ? 0 : NBD_FLAG_READ_ONLY);
}

/* ---- Calling the backend ------------------------------------------------- */

/* Must a request be on permanent storage before it is answered?  Only a write
 * with FUA, or on an export that writes through.  A backend with NATIVE_FUA
 * sees to it; else a flush follows. */
static int ex_wants_fua(const struct ex *ex, const struct nbdserve_req *r) {
  uint32_t f = ex->pub.flags;
  if (!r->len || !wire_cmd(r->type)->writes) return 0;
  if (f & NBDSERVE_EXPORT_UNSAFE) return 0;
  return (r->flags & NBD_CMD_FLAG_FUA) || (f & NBDSERVE_EXPORT_WRITETHROUGH);
}

/* Calls the backend's function for a request.  Only zero and extents may be
 * missing: -ENOTSUP, and all is data.  x: gets the extents of BLOCK_STATUS. */
static int ex_dispatch(const struct ex *ex, const struct nbdserve_req *r,
                       struct nbdserve_extents *x) {
  const struct nbdserve_ops *ops = ex->pub.ops;
  void *ctx = ex->pub.ctx;
  /* Validated, so each of these can only be set where it means something. */
  uint32_t f = r->flags & (NBDSERVE_CMD_NO_HOLE | NBDSERVE_CMD_REQ_ONE |
                           NBDSERVE_CMD_FAST_ZERO);
  if (ex_wants_fua(ex, r) && ex->pub.flags & NBDSERVE_EXPORT_NATIVE_FUA)
    f |= NBDSERVE_CMD_FUA;
  switch (r->type) {
  case NBD_CMD_READ:
    return ops->read(ctx, r->buf, r->off, r->len, f);
  case NBD_CMD_WRITE:
    return ops->write(ctx, r->buf, r->off, r->len, f);
  case NBD_CMD_FLUSH:
    return ops->flush(ctx, f);
  case NBD_CMD_TRIM:
    return ops->trim(ctx, r->off, r->len, f);
  case NBD_CMD_CACHE:
    return ops->cache(ctx, r->off, r->len, f);
  case NBD_CMD_WRITE_ZEROES:
    return ops->zero ? ops->zero(ctx, r->off, r->len, f) : -ENOTSUP;
  case NBD_CMD_BLOCK_STATUS:
    return ops->extents ? ops->extents(ctx, r->off, r->len, f, x) : 0;
  default:
    assert(0); /* (E2) */
    return -EINVAL;
  }
}

/* The same, for an export that is SERIAL one call at a time.  0 or -errno. */
static int ex_call(struct ex *ex, const struct nbdserve_req *r,
                   struct nbdserve_extents *x) {
  int is_serial = (ex->pub.flags & NBDSERVE_EXPORT_SERIAL) != 0;
  if (is_serial) os_lock(&ex->serial);
  int err = ex_dispatch(ex, r, x);
  if (is_serial) os_unlock(&ex->serial);
  return ex_believe(ex->server, ex->pub.name, wire_cmd(r->type)->name, err);
}

/* ---- Flush --------------------------------------------------------------- */

/* Calls the backend's flush, as the flush of that number.  Takes and gives back
 * ex->lock, which the caller holds, around the call. */
static void ex_run_flush(struct ex *ex, uint64_t number) {
  const struct nbdserve_req r = {.type = NBD_CMD_FLUSH};
  assert(!ex->flush_runs && number == ex->flushes_begun + 1);
  ex->flushes_begun = number;
  ex->flush_runs = 1;
  os_unlock(&ex->lock);
  os_lock(&ex->server->lock);
  ex->server->totals.flushes++;
  os_unlock(&ex->server->lock);
  int err = ex_call(ex, &r, NULL);
  os_lock(&ex->lock);
  ex->flush_runs = 0;
  if (err) {
    ex->flush_failed = number;
    ex->flush_err = err;
  }
  os_wake_all(&ex->lock);
}

/* All writes that returned before this call are on permanent storage when it
 * returns 0; else -errno.  One caller flushes for all that wait (E3):
 *
 *   flush 7    |begins ................ ends|
 *                    ^ we come: 7 may have missed our writes, so we need 8
 *   flush 8                                 |begins ........ ends|
 *                    one of those that need it runs it           ^ we go
 *
 * If a later one fails meanwhile we fail, too, because that flush also covered
 * our writes. */
static int ex_flush(struct ex *ex) {
  if (!ex->pub.ops->flush || (ex->pub.flags & NBDSERVE_EXPORT_UNSAFE)) return 0;
  os_lock(&ex->lock);
  uint64_t needed = ex->flushes_begun + 1; /* the first that begins after now */
  while (ex->flush_runs && ex->flushes_begun <= needed)
    os_wait(&ex->lock);
  if (ex->flushes_begun < needed) ex_run_flush(ex, needed);
  assert(ex->flushes_begun >= needed);
  assert(ex->flush_failed <= ex->flushes_begun);
  int err = ex->flush_failed >= needed ? ex->flush_err : 0;
  os_unlock(&ex->lock);
  return err;
}

/* ---- Block status -------------------------------------------------------- */

struct nbdserve_extents {
  uint64_t left;     /* bytes of the request that are still to be described */
  uint64_t overhang; /* bytes at the front of the next extent from the host
                        that were described with the one before it */
  uint64_t align;    /* boundaries in the reply are multiples of it */
  unsigned n;        /* extents so far */
  unsigned max;      /* that the reply may have */
  int lied;          /* the host gave a status that does not exist */
  int extended;      /* length and status have 8 bytes each, else 4 */
  uint64_t last_len; /* of the last extent so far */
  uint32_t last_status;
  unsigned char *data; /* they begin here */
};

/* Adds len bytes to the extents of the reply: to the last one, if the status is
 * the same.  If there is no room the report ends here. */
static void ex_put_extent(struct nbdserve_extents *x, uint64_t len,
                          uint32_t status) {
  assert(len > 0 && len <= x->left && x->n <= x->max);
  x->left -= len;
  if (x->n && x->last_status == status) {
    x->last_len += len;
  } else if (x->n < x->max) {
    x->n++;
    x->last_len = len;
    x->last_status = status;
  } else {
    x->left = 0;
  }
  if (x->extended) {
    unsigned char *p = x->data + (size_t)WIRE_EXT_EXTENT_LEN * (x->n - 1);
    u_put64(p, x->last_len);
    u_put64(p + 8, x->last_status);
  } else {
    unsigned char *p = x->data + (size_t)WIRE_EXTENT_LEN * (x->n - 1);
    assert(x->last_len <= UINT32_MAX); /* as was the request's */
    u_put32(p, (uint32_t)x->last_len);
    u_put32(p + 4, x->last_status);
  }
}

/* Cuts what the host reports at multiples of align: [a block that it shares
 * with the extent before][whole blocks][a block that it shares with the next
 * one].  A shared block is described as data, whatever its parts are. */
int nbdserve_extent(struct nbdserve_extents *x, uint64_t len, uint32_t status) {
  if (status & ~(NBDSERVE_EXTENT_HOLE | NBDSERVE_EXTENT_ZERO)) x->lied = 1;
  assert(x->n <= x->max && x->align > 0);
  uint64_t described = u_min(len, x->overhang);
  x->overhang -= described;
  len = u_min(len - described, x->left);
  uint64_t whole = len == x->left ? len : len - len % x->align;
  uint64_t rest = len - whole;
  if (whole) ex_put_extent(x, whole, status);
  if (rest && x->left) {
    uint64_t block = u_min(x->align, x->left);
    x->overhang = block - rest;
    assert(x->overhang < x->align);
    ex_put_extent(x, block, 0);
  }
  return x->left == 0;
}

/* Asks for the extents of a request.  r->buf becomes the payload of its reply,
 * of r->status_len bytes, which the request owns. */
static int ex_block_status(struct ex *ex, struct nbdserve_req *r) {
  int extended = r->mode == MODE_EXTENDED;
  size_t head = extended ? WIRE_EXT_STATUS_LEN : WIRE_STATUS_LEN;
  size_t each = extended ? WIRE_EXT_EXTENT_LEN : WIRE_EXTENT_LEN;
  struct nbdserve_extents x = {
      .left = r->len, .align = ex->pub.min_block, .extended = extended};
  x.max =
      (unsigned)u_min(ex->pub.max_request / WIRE_EXT_EXTENT_LEN, EX_EXTENTS);
  if (r->flags & NBD_CMD_FLAG_REQ_ONE) x.max = 1;
  assert(r->mode != MODE_SIMPLE && !r->owned);
  r->buf = r->owned = NBDSERVE_MALLOC(head + each * x.max);
  if (!r->buf) return -ENOMEM;
  x.data = r->buf + head;
  int err = ex_call(ex, r, &x);
  if (!err && x.lied) {
    ex_log_lie(ex->server, ex->pub.name, "extents",
               "gave a status that does not exist");
    err = -EIO;
  }
  if (err) return err;
  if (!x.n) nbdserve_extent(&x, r->len, 0); /* proto.md: at least one */
  assert(x.n > 0 && x.n <= x.max && x.max <= EX_EXTENTS);
  u_put32(r->buf, WIRE_CONTEXT_ID);
  if (extended) u_put32(r->buf + 4, x.n);
  r->status_len = head + each * x.n;
  return 0;
}

/* ---- One request on a backend -------------------------------------------- */

/* Does a WRITE_ZEROES by writing zeroes.  A range above 4 GiB is -EOVERFLOW: it
 * would take long, and nobody could cancel it. */
static int ex_write_zeroes(struct ex *ex, const struct nbdserve_req *r) {
  struct nbdserve_req w = {.type = NBD_CMD_WRITE,
                           .flags = r->flags & NBD_CMD_FLAG_FUA,
                           .off = r->off};
  if (r->len > UINT32_MAX) return -EOVERFLOW;
  uint64_t step = u_min(u_min(r->len, EX_ZERO_STEP), ex->pub.max_request);
  step -= step % ex->pub.min_block; /* r->len is a multiple, so is the rest */
  assert(step > 0);
  w.buf = u_zalloc((size_t)step);
  int err = w.buf ? 0 : -ENOMEM;
  for (uint64_t left = r->len; left > 0 && !err; left -= w.len) {
    w.len = u_min(step, left);
    err = ex_call(ex, &w, NULL);
    w.off += w.len;
  }
  NBDSERVE_FREE(w.buf);
  return err;
}

/* Does a request, without the flush that may have to follow.  0 or -errno. */
static int ex_execute(struct ex *ex, struct nbdserve_req *r) {
  assert(r->len > 0 && r->off <= INT64_MAX && r->len <= INT64_MAX - r->off);
  assert(r->off % ex->pub.min_block == 0); /* (E2) */
  assert(!wire_cmd(r->type)->writes ||
         !(ex->pub.flags & NBDSERVE_EXPORT_READONLY));
  assert(r->buf || !wire_cmd(r->type)->has_data);
  if (r->type == NBD_CMD_BLOCK_STATUS) return ex_block_status(ex, r);
  int err = ex_call(ex, r, NULL);
  if (err == -ENOTSUP && r->type == NBD_CMD_WRITE_ZEROES &&
      !(r->flags & NBD_CMD_FLAG_FAST_ZERO))
    return ex_write_zeroes(ex, r);
  return err;
}

#if !NBDSERVE_NO_FLAT || !NBDSERVE_NO_CAS
/* ---- nbdserve's own backends ----------------------------------------------
 * They do READs and WRITEs many at a time, in ops->run_batch:
 *
 *   void run_batch(void *ctx, struct nbdserve_req *r, size_t n)
 *
 * does r[0..n), which may be mixed, in any order and with as few system calls
 * as it can, in the calling thread, and sets err of each.  Requests that
 * overlap are the client's own risk.  It may run in several threads at once.
 *
 * The context of such a backend begins with struct ex_batched, so that read and
 * write, which the command and tests call, can be batches of one. */
struct ex_batched {
  void (*run_batch)(void *ctx, struct nbdserve_req *r, size_t n);
};

/* ops->read of a backend that has run_batch. */
static int ex_batched_read(void *ctx, void *buf, uint64_t off, uint64_t len,
                           uint32_t flags) {
  struct nbdserve_req r = {
      .type = NBD_CMD_READ, .off = off, .len = len, .buf = buf};
  (void)flags;
  ((struct ex_batched *)ctx)->run_batch(ctx, &r, 1);
  return r.err;
}

/* ops->write of a backend that has run_batch. */
static int ex_batched_write(void *ctx, const void *buf, uint64_t off,
                            uint64_t len, uint32_t flags) {
  struct nbdserve_req r = {.type = NBD_CMD_WRITE, .off = off, .len = len};
  assert(!(flags & NBDSERVE_CMD_FUA)); /* not NATIVE_FUA: a flush follows */
  (void)flags;
  r.buf = (unsigned char *)(uintptr_t)buf; /* which a WRITE only reads */
  ((struct ex_batched *)ctx)->run_batch(ctx, &r, 1);
  return r.err;
}
#endif

/* ==== [8] HANDSHAKE (hs_) ================================================
 * Connections, and fixed newstyle negotiation (proto.md, Handshake and Option
 * types).
 *
 * (H1) The length in an option's head alone frames it: all its data is taken
 *      before anything is answered, so the stream stays in step.
 * (H2) What a client claims is never allocated: data beyond NBDSERVE_MAX_OPTION
 *      is thrown away in pieces.
 * (H3) One deadline covers the whole handshake. */

/* ---- A connection ---------------------------------------------------------
 *
 *   HANDSHAKE --> TRANSMISSION --> DRAINING --> gone
 *
 *   phase          rbuf holds           wbuf holds          threads
 *   HANDSHAKE      an option's data     replies to options  the client's
 *   TRANSMISSION   requests, payloads   slots of READs of   the client's, and
 *                  of the batch's       the batch           workers
 *                  WRITEs
 *   DRAINING       nothing              nothing             workers, until all
 *                                                           is done
 *
 * Who may touch what:
 *
 *   members             by                               under
 *   fixed               any thread                       -
 *   next                whoever walks the clients        nbdserve.lock
 *   negotiated          written by the client's thread   -
 *                       in the handshake, read by all
 *                       from TRANSMISSION on
 *   option, receiving,  the client's thread              -
 *   the batch
 *   sending             whoever answers a request (in    send_lock
 *                       the handshake: the client's
 *                       thread, without a lock)
 *   queue, statistics   the client's thread, workers,    queue_lock
 *                       nbdserve_stats
 *
 * The phase is not stored: it follows from where the client's thread is.
 * queue_lock is waited on by idle workers, for work, and by the client's
 * thread, for a worker to finish (reader_waits). */

enum {
  CONN_RBUF = 256 << 10,   /* bytes received at a time */
  HS_WITHOUT_OPTIONS = 16, /* from this bit of config.without on: options */
  CONN_WBUF = 288 << 10, /* bytes of slots: 64 READs of 4 KiB and their heads */
  TX_IN_BATCH_MAX = 128 << 10, /* the longest READ or WRITE in a batch */
  TX_PIECE = 1 << 20,          /* they are done in pieces of this size, which
                                  is also the longest that a worker gets, the
                                  longest single chunk, and IO_UNIT */
  TX_BATCH = 128,              /* requests in a batch, at most */
  TX_HEADS = 32,               /* long heads that leave in one send, at most */
  TX_HANDED_OVER = 1024, /* requests with workers, if none of them has data */
  TX_MIN_HOLE = 512,     /* bytes: to send a shorter hole saves too little */
  TX_AFTER_LONG_WRITE = 4096, /* bytes received then: a few heads, see there */
  TX_ERROR_TEXT = 80,         /* bytes of an error's text that are sent */
  TX_LOGGED = 10,             /* failed requests of a client that are logged */
  TX_HEAD_ROOM = 64, /* bytes before a READ's data, for its head: 40 and more */
  TX_HEAD_MAX =      /* the longest reply without data: ERROR_OFFSET */
      WIRE_EXT_CHUNK_LEN + WIRE_ERROR_LEN + TX_ERROR_TEXT + WIRE_OFFSET_LEN
};
STATIC_ASSERT(option_fits, (int)NBDSERVE_MAX_OPTION <= (int)CONN_RBUF);
STATIC_ASSERT(option_holds_a_name, NBDSERVE_MAX_OPTION >= WIRE_STRING_MAX);
STATIC_ASSERT(write_fits,
              TX_IN_BATCH_MAX + (int)WIRE_EXT_REQUEST_LEN <= (int)CONN_RBUF);
STATIC_ASSERT(read_fits, TX_IN_BATCH_MAX + TX_HEAD_ROOM <= CONN_WBUF);
STATIC_ASSERT(head_fits,
              WIRE_EXT_CHUNK_LEN + (int)WIRE_OFFSET_LEN <= (int)TX_HEAD_ROOM);
STATIC_ASSERT(piece_is_unit, (int)TX_PIECE == (int)IO_UNIT);

struct conn {
  /* -- fixed */
  struct nbdserve *s;
  int id;     /* for messages: clients are numbered from 1 on */
  int fd;     /* a socket that is closed in the end; -1: it is the caller's */
  int is_tcp; /* see srv_must_linger */
  /* -- */
  struct conn *next; /* of s->conns */
  struct io io;      /* says itself who may touch what */
  /* -- negotiated */
  enum wire_mode mode;
  int no_zeroes;      /* NBD_FLAG_C_NO_ZEROES */
  int has_allocation; /* base:allocation is selected, for the export called: */
  char meta_export[WIRE_STRING_MAX + 1];
  struct ex *export; /* NULL: none so far */
  uint64_t export_size;
  unsigned transmission_flags;
  void (*run_batch)(void *ctx, struct nbdserve_req *r, size_t n); /* or NULL */
  unsigned max_workers;     /* 0: none, the client's thread does all itself */
  unsigned max_handed_over; /* limit for nhanded_over */
  /* -- the option that is being answered */
  uint32_t option;
  const unsigned char *option_data; /* what is left of its data */
  size_t option_left;               /* bytes there */
  /* -- receiving */
  size_t rbuf_pos; /* rbuf[rbuf_pos..rbuf_end) is received and not looked at */
  size_t rbuf_end;
  size_t needed;            /* bytes that are to be there of the next request */
  int after_long_write;     /* another one is likely: see tx_receive */
  unsigned char *piece_buf; /* [TX_HEAD_ROOM + TX_PIECE], made when needed */
  /* -- the batch */
  struct nbdserve_req batch[TX_BATCH];
  size_t nbatch;
  size_t wbuf_used; /* bytes of slots, or of replies to options, in wbuf */
  /* -- sending */
  struct os_monitor send_lock; /* held while io.out is written to */
  int send_err;                /* why nothing is sent any more */
  /* -- queue */
  struct os_monitor queue_lock;
  struct nbdserve_req *queue; /* each for one worker */
  struct nbdserve_req **queue_end;
  struct nbdserve_req *to_flush; /* one worker takes all of them */
  int flush_at_work;             /* a worker took others and is not done */
  unsigned nqueue;
  unsigned nhanded_over; /* in both lists, and being done */
  unsigned nworkers;
  unsigned nidle;
  int closing;      /* DRAINING: no more work comes, workers end */
  int reader_waits; /* the client's thread waits for a worker */
  /* -- statistics, under queue_lock, too */
  struct nbdserve_stats stats;
  unsigned nlogged; /* failed requests that were logged */
  /* -- the buffers, last: they are not zeroed */
  unsigned char rbuf[CONN_RBUF];
  unsigned char wbuf[CONN_WBUF];
};

/* Tells the host's log about a client; the text begins with its number. */
#define conn_log(c, level, ...) \
  u_log(&(c)->s->config, level, "client " __VA_ARGS__)

/* ---- Replies to options -------------------------------------------------- */

/* What the steps of a connection return, in the handshake and in transmission:
 * 0 to go on, the -errno that ends it, or one of these. */
enum conn_step {
  CONN_LEFT = 1,      /* the client leaves in order */
  CONN_NEEDS_MORE = 2 /* the next request is not all there */
};

/* Sends the replies that have gathered in wbuf.  0 or -errno. */
static int hs_send(struct conn *c) {
  struct iovec v = {.iov_base = c->wbuf, .iov_len = c->wbuf_used};
  c->wbuf_used = 0;
  if (!c->send_err) c->send_err = io_send(&c->io, &v, 1);
  return c->send_err;
}

/* Makes room for len more bytes in wbuf, all to be written by the caller.  If
 * sending has failed they are dropped, and hs_run notices it. */
static unsigned char *hs_reserve(struct conn *c, size_t len) {
  assert(len <= CONN_WBUF);
  if (c->wbuf_used + len > CONN_WBUF) hs_send(c);
  unsigned char *p = c->wbuf + c->wbuf_used;
  c->wbuf_used += len;
  assert(c->wbuf_used <= CONN_WBUF);
  return p;
}

/* Begins a reply to the current option, with len bytes of data at the
 * result. */
static unsigned char *hs_reply(struct conn *c, uint32_t type, size_t len) {
  unsigned char *p = hs_reserve(c, WIRE_OPTION_REPLY_LEN + len);
  assert(len <= UINT32_MAX);
  u_put64(p, NBD_REP_MAGIC);
  u_put32(p + 8, c->option);
  u_put32(p + 12, type);
  u_put32(p + 16, (uint32_t)len);
  return p + WIRE_OPTION_REPLY_LEN;
}

/* Answers the option with success. */
static int hs_ack(struct conn *c) {
  hs_reply(c, NBD_REP_ACK, 0);
  return 0;
}

/* Answers the option with an error; haggling goes on. */
static int hs_refuse(struct conn *c, uint32_t type, const char *why) {
  size_t n = strlen(why);
  memcpy(hs_reply(c, type, n), why, n);
  conn_log(c, NBDSERVE_LOG_INFO, "%d: option %" PRIu32 " refused: %s", c->id,
           c->option, why);
  return 0;
}

/* ---- Reading an option's data -------------------------------------------- */

/* Moves on in the option's data. */
static void hs_advance(struct conn *c, size_t n) {
  assert(n <= c->option_left);
  c->option_data += n;
  c->option_left -= n;
}

/* Takes a string with its 32-bit length off the option's data and copies it to
 * out[WIRE_STRING_MAX + 1].  0, or the error to answer with. */
static uint32_t hs_take_string(struct conn *c, char *out) {
  if (c->option_left < 4) return NBD_REP_ERR_INVALID;
  uint32_t n = u_get32(c->option_data);
  hs_advance(c, 4);
  if (n > c->option_left) return NBD_REP_ERR_INVALID;
  if (n > WIRE_STRING_MAX) return NBD_REP_ERR_TOO_BIG;
  memcpy(out, c->option_data, n);
  out[n] = 0;
  hs_advance(c, n);
  return memchr(out, 0, n) ? NBD_REP_ERR_INVALID : 0; /* NAME NUL JUNK */
}

/* ---- Entering an export -------------------------------------------------- */

/* Does SET_META_CONTEXT for that name hold for this export? */
static int hs_has_allocation(const struct conn *c, const char *name) {
  return c->has_allocation && strcmp(c->meta_export, name) == 0;
}

/* Settles the export, which the connection owns from now on, and all that
 * transmission has to know of it. */
static void hs_enter(struct conn *c, struct ex *ex, const char *name,
                     uint64_t size) {
  const struct nbdserve_config *k = &c->s->config;
  assert(!c->export && ex && size % ex->pub.min_block == 0);
  c->export = ex;
  c->export_size = size;
  c->has_allocation = hs_has_allocation(c, name);
  c->transmission_flags = ex_transmission_flags(ex, c->mode, c->has_allocation);
  /* `before` is asked for each request, so there is nothing to do together. */
  if (!k->before) c->run_batch = ex->pub.ops->run_batch;
  if (k->threads > 1) c->max_workers = k->threads;
  c->max_handed_over = c->run_batch ? TX_HANDED_OVER : k->threads;
  assert(c->max_handed_over > 0);
  conn_log(c, NBDSERVE_LOG_INFO, "%d: export '%s', %" PRIu64 " bytes%s", c->id,
           name, size,
           c->transmission_flags & NBD_FLAG_READ_ONLY ? ", read-only" : "");
}

/* Enters the export of that name.  0, or -errno as ex_acquire. */
static int hs_enter_name(struct conn *c, const char *name) {
  struct ex *ex;
  uint64_t size;
  int err = ex_acquire(c->s, name, &ex, &size);
  if (!err) hs_enter(c, ex, name, size);
  return err;
}

/* ---- The options -----------------------------------------------------------
 * Each function takes its option's data, which is all there, and answers: 0, or
 * the -errno that closes the connection.  When c->export is set haggling ends.
 */

/* proto.md, NBD_OPT_EXPORT_NAME: all of the data is the name.  This option has
 * no error reply: what is wrong closes the connection. */
static int hs_opt_export_name(struct conn *c) {
  size_t len = WIRE_EXPORT_NAME_LEN;
  char name[WIRE_STRING_MAX + 1];
  if (c->mode == MODE_EXTENDED) return -EPROTO; /* GO is needed */
  assert(c->option_left <= WIRE_STRING_MAX);    /* hs_option has seen to it */
  memcpy(name, c->option_data, c->option_left);
  name[c->option_left] = 0;
  if (strlen(name) != c->option_left) return -ENOENT;
  int err = hs_enter_name(c, name);
  if (err) return err;
  if (!c->no_zeroes) len += WIRE_EXPORT_NAME_PAD;
  unsigned char *p = memset(hs_reserve(c, len), 0, len);
  u_put64(p, c->export_size);
  u_put16(p + 8, c->transmission_flags);
  return 0;
}

/* Lists an export; the host's list callback calls it, too.  Not 0: the client
 * is gone, and the rest is for nobody. */
static int hs_list_one(void *conn, const char *name, const char *description) {
  struct conn *c = conn;
  size_t n = name ? strlen(name) : 0;
  size_t d = description ? strlen(description) : 0;
  /* The protocol has no longer strings, so it cannot be listed. */
  if (n > WIRE_STRING_MAX || d > WIRE_STRING_MAX) return 0;
  unsigned char *p = hs_reply(c, NBD_REP_SERVER, 4 + n + d);
  u_put32(p, (uint32_t)n);
  if (n) memcpy(p + 4, name, n);
  if (d) memcpy(p + 4 + n, description, d);
  return c->send_err;
}

/* proto.md, NBD_OPT_LIST.  s->lock is not held while a reply is sent: a client
 * that reads slowly must not hold up others.  (E1): the list only grows. */
static int hs_opt_list(struct conn *c) {
  const struct nbdserve_config *k = &c->s->config;
  int err = 0;
  if (c->option_left)
    return hs_refuse(c, NBD_REP_ERR_INVALID, "data with NBD_OPT_LIST");
  struct ex *ex = ex_next(c->s, NULL);
  for (; ex && !c->send_err; ex = ex_next(c->s, ex))
    hs_list_one(c, ex->pub.name, ex->pub.description);
  if (!c->send_err && k->list)
    err = ex_believe(c->s, "", "list", k->list(k->ctx, hs_list_one, c));
  if (c->send_err) return c->send_err;
  if (!err) return hs_ack(c);
  u_log(k, NBDSERVE_LOG_WARNING, "the host's list of exports: %s",
        u_errno_text(err));
  return hs_refuse(c, NBD_REP_ERR_UNKNOWN, "the list is not complete");
}

/* Sends information that is a text. */
static void hs_put_text(struct conn *c, enum nbd_info type, const char *text) {
  size_t n = strlen(text);
  unsigned char *p = hs_reply(c, NBD_REP_INFO, 2 + n);
  u_put16(p, type);
  memcpy(p + 2, text, n);
}

/* proto.md, NBD_INFO_...: sends what INFO and GO give.  EXPORT always; block
 * sizes also unasked if they are not what a client takes for granted. */
static void hs_put_infos(struct conn *c, const struct ex *ex, uint64_t size,
                         unsigned flags, unsigned asked) {
  const struct nbdserve_export *e = &ex->pub;
  unsigned char *p = hs_reply(c, NBD_REP_INFO, WIRE_INFO_EXPORT_LEN);
  u_put16(p, NBD_INFO_EXPORT);
  u_put64(p + 2, size);
  u_put16(p + 10, flags);
  if (asked & 1u << NBD_INFO_NAME) hs_put_text(c, NBD_INFO_NAME, e->name);
  if (asked & 1u << NBD_INFO_DESCRIPTION && *e->description)
    hs_put_text(c, NBD_INFO_DESCRIPTION, e->description);
  if (!(asked & 1u << NBD_INFO_BLOCK_SIZE) && e->min_block == 1 &&
      e->preferred_block == EX_DEFAULT_BLOCK &&
      e->max_request == EX_DEFAULT_MAX)
    return;
  p = hs_reply(c, NBD_REP_INFO, WIRE_INFO_BLOCK_SIZE_LEN);
  u_put16(p, NBD_INFO_BLOCK_SIZE);
  u_put32(p + 2, e->min_block);
  u_put32(p + 6, e->preferred_block);
  u_put32(p + 10, e->max_request);
}

/* Takes the list of information types off the data of INFO or GO: a set of
 * bits, one for each enum nbd_info; unknown types are ignored (proto.md). */
static uint32_t hs_take_infos(struct conn *c, unsigned *asked) {
  if (c->option_left < 2) return NBD_REP_ERR_INVALID;
  size_t n = u_get16(c->option_data);
  hs_advance(c, 2);
  if (c->option_left != 2 * n) return NBD_REP_ERR_INVALID;
  for (*asked = 0; n > 0; n--) {
    unsigned type = u_get16(c->option_data);
    hs_advance(c, 2);
    if (type <= NBD_INFO_BLOCK_SIZE) *asked |= 1u << type;
  }
  return 0;
}

/* proto.md, NBD_OPT_INFO and NBD_OPT_GO: the same, but GO enters the export. */
static int hs_opt_go(struct conn *c) {
  char name[WIRE_STRING_MAX + 1];
  unsigned asked = 0;
  struct ex *ex;
  uint64_t size;
  uint32_t bad = hs_take_string(c, name);
  if (!bad) bad = hs_take_infos(c, &asked);
  if (bad) return hs_refuse(c, bad, "malformed request for information");
  int err = ex_acquire(c->s, name, &ex, &size);
  if (err == -ENOENT)
    return hs_refuse(c, NBD_REP_ERR_UNKNOWN, "no such export");
  if (err) return hs_refuse(c, NBD_REP_ERR_UNKNOWN, u_errno_text(err));
  unsigned flags =
      ex_transmission_flags(ex, c->mode, hs_has_allocation(c, name));
  hs_put_infos(c, ex, size, flags, asked);
  /* proto.md: a client that does not ask for block sizes might send unaligned
   * requests. */
  int must_ask = ex->pub.min_block > 1 && !(asked & 1u << NBD_INFO_BLOCK_SIZE);
  if (c->option == NBD_OPT_GO && !must_ask) {
    hs_ack(c);
    hs_enter(c, ex, name, size);
    return 0;
  }
  ex_release(ex);
  if (!must_ask) return hs_ack(c);
  return hs_refuse(c, NBD_REP_ERR_BLOCK_SIZE_REQD, "ask for the block size");
}

/* proto.md, NBD_OPT_STRUCTURED_REPLY and NBD_OPT_EXTENDED_HEADERS. */
static int hs_opt_mode(struct conn *c) {
  enum wire_mode mode =
      c->option == NBD_OPT_EXTENDED_HEADERS ? MODE_EXTENDED : MODE_STRUCTURED;
  if (c->option_left)
    return hs_refuse(c, NBD_REP_ERR_INVALID, "data where none belongs");
  if (c->mode == MODE_EXTENDED && mode != MODE_EXTENDED)
    return hs_refuse(c, NBD_REP_ERR_EXT_HEADER_REQD,
                     "the headers are extended");
  c->mode = mode;
  return hs_ack(c);
}

static const char hs_allocation[] = "base:allocation";

/* Takes the queries off the data of LIST or SET_META_CONTEXT.  *found: one of
 * them means base:allocation.  0, or the error to answer with. */
static uint32_t hs_take_queries(struct conn *c, int *found) {
  int lists = c->option == NBD_OPT_LIST_META_CONTEXT;
  char query[WIRE_STRING_MAX + 1];
  if (c->option_left < 4) return NBD_REP_ERR_INVALID;
  uint32_t n = u_get32(c->option_data);
  hs_advance(c, 4);
  *found = lists && n == 0; /* no query at all lists everything */
  for (; n > 0; n--) {
    uint32_t bad = hs_take_string(c, query);
    if (bad) return bad;
    if (strcmp(query, hs_allocation) == 0) *found = 1;
    if (lists && strcmp(query, "base:") == 0) *found = 1; /* the namespace */
  }
  return c->option_left ? NBD_REP_ERR_INVALID : 0;
}

/* proto.md, NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT. */
static int hs_opt_meta_context(struct conn *c) {
  const size_t len = sizeof hs_allocation - 1;
  char name[WIRE_STRING_MAX + 1];
  int sets = c->option == NBD_OPT_SET_META_CONTEXT;
  int found = 0;
  struct ex *ex;
  uint64_t size;
  if (c->mode == MODE_SIMPLE)
    return hs_refuse(c, NBD_REP_ERR_INVALID, "structured replies come first");
  uint32_t bad = hs_take_string(c, name);
  if (!bad) bad = hs_take_queries(c, &found);
  if (bad) return hs_refuse(c, bad, "malformed query for metadata contexts");
  if (ex_acquire(c->s, name, &ex, &size))
    return hs_refuse(c, NBD_REP_ERR_UNKNOWN, "no such export");
  ex_release(ex);
  if (!found) return hs_ack(c);
  unsigned char *p = hs_reply(c, NBD_REP_META_CONTEXT, 4 + len);
  u_put32(p, sets ? WIRE_CONTEXT_ID : 0); /* ids mean something in SET only */
  memcpy(p + 4, hs_allocation, len);
  if (sets) {
    c->has_allocation = 1;
    strcpy(c->meta_export, name);
  }
  return hs_ack(c);
}

/* A new option gets a row here.  ABORT is not in it: hs_option answers it
 * before it looks at anything else. */
static int (*const hs_options[])(struct conn *c) = {
    [NBD_OPT_EXPORT_NAME] = hs_opt_export_name,
    [NBD_OPT_LIST] = hs_opt_list,
    [NBD_OPT_INFO] = hs_opt_go,
    [NBD_OPT_GO] = hs_opt_go,
    [NBD_OPT_STRUCTURED_REPLY] = hs_opt_mode,
    [NBD_OPT_LIST_META_CONTEXT] = hs_opt_meta_context,
    [NBD_OPT_SET_META_CONTEXT] = hs_opt_meta_context,
    [NBD_OPT_EXTENDED_HEADERS] = hs_opt_mode,
};

/* ---- Haggling ------------------------------------------------------------ */

STATIC_ASSERT(options_have_bits,
              HS_WITHOUT_OPTIONS + COUNT_OF(hs_options) <= 32);

/* Receives an option's data.  More than is looked at is thrown away, piece by
 * piece: what is left in rbuf then means nothing. */
static int hs_take_data(struct conn *c, uint32_t len) {
  while (len > 0) {
    uint32_t piece = (uint32_t)u_min(len, CONN_RBUF); /* (H1), (H2) */
    int err = io_recv_all(&c->io, c->rbuf, piece);
    if (err) return err;
    len -= piece;
  }
  return 0;
}

/* Receives an option and answers it.  0, CONN_LEFT or -errno. */
static int hs_option(struct conn *c) {
  unsigned char head[WIRE_OPTION_LEN];
  int err = io_recv_all(&c->io, head, sizeof head);
  if (err) return err;
  uint32_t option = c->option = u_get32(head + 8);
  uint32_t len = u_get32(head + 12);
  if (u_get64(head) != NBD_OPTION_MAGIC) return -EPROTO;
  if (option == NBD_OPT_EXPORT_NAME && len > WIRE_STRING_MAX)
    return -ENOENT; /* it could not be answered anyway */
  err = hs_take_data(c, len);
  if (err) return err;
  /* proto.md: each SET replaces the selection, also one that fails. */
  if (option == NBD_OPT_SET_META_CONTEXT) c->has_allocation = 0;
  if (option == NBD_OPT_ABORT) { /* whatever its data, however much */
    hs_ack(c);
    return CONN_LEFT;
  }
  if (option >= COUNT_OF(hs_options) || !hs_options[option] ||
      (c->s->config.without >> (HS_WITHOUT_OPTIONS + option) & 1))
    return hs_refuse(c, NBD_REP_ERR_UNSUP, "unknown option");
  if (len > NBDSERVE_MAX_OPTION)
    return hs_refuse(c, NBD_REP_ERR_TOO_BIG, "too much data");
  c->option_data = c->rbuf;
  c->option_left = len;
  return hs_options[option](c);
}

/* Greets the client and takes its flags.  0 or -errno. */
static int hs_greet(struct conn *c) {
  unsigned char flags[WIRE_CLIENT_FLAGS_LEN];
  unsigned char *p = hs_reserve(c, WIRE_HELLO_LEN);
  u_put64(p, NBD_INIT_MAGIC);
  u_put64(p + 8, NBD_OPTION_MAGIC);
  u_put16(p + 16, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
  int err = hs_send(c);
  if (!err) err = io_recv_all(&c->io, flags, sizeof flags);
  if (err) return err;
  uint32_t known = NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES;
  if (u_get32(flags) & ~known) return -EPROTO;
  c->no_zeroes = (u_get32(flags) & NBD_FLAG_C_NO_ZEROES) != 0;
  return 0;
}

/* The whole handshake.  0: c->export is entered; else see enum conn_step. */
static int hs_run(struct conn *c) {
  assert(!c->io.deadline && !c->export && !c->wbuf_used);
  c->io.deadline = os_now_ms() + c->s->config.handshake_ms; /* (H3) */
  int step = hs_greet(c);
  while (!step && !c->export) {
    step = hs_option(c);
    if (step >= 0 && hs_send(c)) step = c->send_err;
  }
  c->io.deadline = 0;
  assert(step || !c->wbuf_used);
  return step;
}

/* ==== [9] TRANSMISSION (tx_) =============================================
 * Requests in, replies out.  The states of a request stand in [5].
 *
 * ---- The life of a request ------------------------------------------------
 *
 *   tx_receive       one recv() brings what has come into c->rbuf
 *   tx_next_request  parses, waits for the payload, validates
 *   tx_dispatch      decides where the request is done:
 *
 *   requests                  done by            data in
 *   refused, or empty         nobody             -
 *   refused, with a payload   nobody             piece_buf: tx_in_pieces
 *   longer than a batch's
 *   READ, WRITE up to         client's thread,   WRITE: rbuf, where it came;
 *   TX_IN_BATCH_MAX           all of a batch     READ: a slot in wbuf
 *                             together
 *   longer READ, WRITE        client's thread    piece_buf: tx_in_pieces
 *   READ, WRITE up to         a worker           a buffer of its own: tx_copied
 *   TX_PIECE without
 *   run_batch
 *   FLUSH, TRIM, CACHE,       a worker; FLUSH:   BLOCK_STATUS: a buffer of its
 *   WRITE_ZEROES,             after the batch's  own
 *   BLOCK_STATUS              writes
 *
 *   tx_run_batch     does what has gathered, when rbuf holds no whole request
 *                    any more or the batch is full
 *   tx_answer        counts, logs, sends, frees, in whichever thread is done
 *
 * Without run_batch: on a host's backend, or with config.before.
 *
 * A WRITE of 4 KiB to a file: recv() puts it into rbuf.  It goes into the
 * batch, and its r.buf points into rbuf, which nobody touches until the batch
 * is done.  run_batch calls pwrite from there.  The reply is one of the heads
 * that tx_answer gathers, and all replies of the batch leave in one sendmsg().
 * All of this happens in the client's thread.  A WRITE with FUA is TO_FLUSH
 * after pwrite: a worker flushes and answers.
 *
 * A FLUSH is TO_FLUSH from the start.  When the batch's writes are done it
 * joins c->to_flush; one worker takes all requests that are there, calls
 * ex_flush once and answers them all.  ex_flush waits for a flush of the export
 * that begins after it was asked for.  A write's reply is sent only after the
 * backend's write has returned.  So, whichever client sent the write: if its
 * reply was sent before the FLUSH was received, the write had returned before
 * the flush began, and is covered by it.
 *
 * A client that never reads: who sends to it waits in poll() with send_lock
 * held, until the client takes something or its time is over (I2).  Then
 * send_err is set and nothing is sent any more.  Meanwhile the other threads of
 * this client wait when they have to send, and its own thread receives no more
 * when it has to send or max_handed_over is reached, so memory is bounded (T5).
 * Other clients share none of these locks and do not notice.
 *
 * ---- Rules ----------------------------------------------------------------
 * (T1) Every request gets exactly one reply, DISC none.  The order is free.
 * (T2) The buffer of a READ has room for the reply's head in front of the data,
 *      so that neither is ever copied.  Those of a batch lie side by side in
 *      wbuf, each in its slot, and neighbours leave as one piece.  A READ that
 *      failed or brought nothing but zeroes leaves its slot unused: it is
 *      answered by a head alone, which stands with the other replies' heads.
 * (T3) A batch's writes are done before its flushes start: a flush covers all
 *      that was answered before it arrived, and more.
 * (T4) FLUSH, TRIM, CACHE, WRITE_ZEROES and BLOCK_STATUS, and without run_batch
 *      READ and WRITE, may take as long as they like: nothing behind them
 *      waits, up to max_handed_over of them and while a worker can be had.
 *      What the client's thread does itself, which is batches and pieces, holds
 *      up the requests behind it.
 * (T5) Memory is bounded and nobody waits for it: a client has its buffers and
 *      max_handed_over requests with workers.  Without run_batch each of these
 *      may hold TX_PIECE bytes.  With it no READ or WRITE is copied, and
 *      each holds the extents of a BLOCK_STATUS at most. */

/* ---- Replies ------------------------------------------------------------- */

/* The error that is sent for a request. */
static uint32_t tx_error(const struct nbdserve_req *r) {
  uint32_t error = wire_error(r->err);
  /* proto.md: NBD_ENOTSUP is an answer to FAST_ZERO only. */
  if (error == NBD_ENOTSUP && !(r->flags & NBD_CMD_FLAG_FAST_ZERO))
    return NBD_EINVAL;
  return error;
}

/* Writes the payload of an error chunk.  Returns its length. */
static size_t tx_put_error(unsigned char *p, const struct nbdserve_req *r) {
  const char *text = r->refused ? r->refused : u_errno_text(r->err);
  size_t n = (size_t)u_min(strlen(text), TX_ERROR_TEXT);
  u_put32(p, tx_error(r));
  u_put16(p + 4, (unsigned)n);
  memcpy(p + WIRE_ERROR_LEN, text, n);
  n += WIRE_ERROR_LEN;
  if (!r->err_has_off) return n;
  u_put64(p + n, r->err_off);
  return n + WIRE_OFFSET_LEN;
}

/* The data that follows the head of a reply; no bytes of it if there is
 * none. */
static struct iovec tx_data(const struct nbdserve_req *r) {
  struct iovec v = {.iov_base = r->buf};
  if (r->err || r->all_zero) return v;
  if (r->type == NBD_CMD_READ) v.iov_len = (size_t)r->len;
  if (r->type == NBD_CMD_BLOCK_STATUS) v.iov_len = r->status_len;
  return v;
}

/* Writes all of a reply but its data to p[TX_HEAD_MAX]: its mode, its outcome
 * and its command decide what it looks like.  Returns the number of bytes. */
static size_t tx_put_head(unsigned char *p, const struct nbdserve_req *r) {
  int is_status = r->type == NBD_CMD_BLOCK_STATUS;
  int is_read = r->type == NBD_CMD_READ;
  int has_chunks =
      r->mode == MODE_EXTENDED ||
      (r->mode == MODE_STRUCTURED && (is_read || is_status || r->err));
  if (!has_chunks) return wire_put_simple(p, tx_error(r), r->cookie);
  unsigned char *payload = p + wire_chunk_len(r->mode);
  enum nbd_reply_type type = NBD_REPLY_TYPE_NONE;
  size_t n = 0; /* bytes of payload that are written here */
  if (r->err) {
    type = r->err_has_off ? NBD_REPLY_TYPE_ERROR_OFFSET : NBD_REPLY_TYPE_ERROR;
    n = tx_put_error(payload, r);
  } else if (is_status) {
    type = r->mode == MODE_EXTENDED ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT
                                    : NBD_REPLY_TYPE_BLOCK_STATUS;
  } else if (is_read && r->len) {
    type = NBD_REPLY_TYPE_OFFSET_DATA;
    u_put64(payload, r->off);
    n = WIRE_OFFSET_LEN;
    if (r->all_zero) {
      type = NBD_REPLY_TYPE_OFFSET_HOLE;
      u_put32(payload + n, (uint32_t)r->len);
      n = WIRE_HOLE_LEN;
    }
  }
  wire_put_chunk(p, r, type, n + tx_data(r).iov_len);
  assert(payload + n <= p + TX_HEAD_MAX);
  return (size_t)(payload - p) + n;
}

/* Has a READ brought only zeroes, so that a hole can be sent for them?  Where
 * that is not so, one look at the data mostly shows it. */
static int tx_is_all_zero(const struct nbdserve_req *r) {
  return r->type == NBD_CMD_READ && !r->err && r->mode != MODE_SIMPLE &&
         r->len >= TX_MIN_HOLE && u_is_zero(r->buf, (size_t)r->len);
}

/* ---- Answering: gather, send, count, free -------------------------------- */

/* Replies that leave in one send.  Gathering them needs no socket. */
struct tx_out {
  struct iovec v[TX_BATCH + 2 * TX_HEADS];
  int n;
  size_t heads_len; /* bytes used of: */
  unsigned char heads[TX_HEADS * TX_HEAD_MAX];
};

/* Adds a piece, to the one before it if that ends where it begins. */
static void tx_add_piece(struct tx_out *out, void *p, size_t len) {
  struct iovec *last = out->n ? &out->v[out->n - 1] : NULL;
  if (!len) return;
  if (last && (unsigned char *)last->iov_base + last->iov_len == p) {
    last->iov_len += len;
    return;
  }
  assert((size_t)out->n < COUNT_OF(out->v));
  out->v[out->n].iov_base = p;
  out->v[out->n].iov_len = len;
  out->n++;
}

/* Gathers replies, each with its data behind it, as many as there is room for.
 * The head of a READ's data goes into the room in front of it, so READs side by
 * side in wbuf become one piece (T2).  Returns the first of the list that did
 * not fit, or NULL. */
static struct nbdserve_req *tx_gather(struct tx_out *out,
                                      struct nbdserve_req *r) {
  out->n = 0;
  out->heads_len = 0;
  for (; r; r = r->next) {
    assert(r->state == REQ_DONE);
    if (out->heads_len + TX_HEAD_MAX > sizeof out->heads) break;
    if ((size_t)out->n + 2 > COUNT_OF(out->v)) break;
    r->all_zero = tx_is_all_zero(r);
    struct iovec data = tx_data(r);
    if (r->type == NBD_CMD_READ && data.iov_len) {
      size_t room = wire_read_head_len(r->mode);
      /* Of a long simple reply only the first piece has a head. */
      if (r->mode == MODE_SIMPLE && r->off != r->client_off) room = 0;
      if (room) tx_put_head(r->buf - room, r);
      tx_add_piece(out, r->buf - room, room + data.iov_len);
      continue;
    }
    unsigned char *head = out->heads + out->heads_len;
    size_t len = tx_put_head(head, r);
    out->heads_len += len;
    tx_add_piece(out, head, len);
    tx_add_piece(out, data.iov_base, data.iov_len);
  }
  return r;
}

/* Sends the n pieces at v, in one go as far as other threads can see.  After
 * the first error nothing is sent any more, and the client's thread, which may
 * wait for a request, is told by the end of its stream (unless that is a pipe
 * of its own).  Returns 0, or -errno, which may be of an earlier send: with n 0
 * only that is looked at. */
static int tx_send(struct conn *c, struct iovec *v, int n) {
  os_lock(&c->send_lock);
  if (!c->send_err && n) {
    c->send_err = io_send(&c->io, v, n);
    if (c->send_err) shutdown(c->io.out, SHUT_RDWR);
  }
  int err = c->send_err;
  os_unlock(&c->send_lock);
  return err;
}

/* Sends the replies of a list, in as few sends as possible.  0 or -errno. */
static int tx_send_all(struct conn *c, struct nbdserve_req *list) {
  struct tx_out out;
  int err = 0;
  while (list && !err) {
    list = tx_gather(&out, list);
    assert(out.n > 0 && out.heads_len <= sizeof out.heads);
    err = tx_send(c, out.v, out.n);
  }
  return err;
}

/* Logs a request that is answered; of those that failed only the first few.
 * What a client did wrong is of interest to its author, what a backend could
 * not do to the operator.  -ENOTSUP is the usual answer to FAST_ZERO, no
 * failure. */
static void tx_log(struct conn *c, const struct nbdserve_req *r) {
  const struct wire_cmd *cmd = wire_cmd(r->type);
  int level = r->refused ? NBDSERVE_LOG_INFO : NBDSERVE_LOG_WARNING;
  if (!r->err || r->err == -ENOTSUP) level = NBDSERVE_LOG_TRACE;
  unsigned nth_failure = 0;
  if (level > c->s->config.log_level) return;
  if (level < NBDSERVE_LOG_TRACE) {
    os_lock(&c->queue_lock); /* not held below: the host's code runs there */
    nth_failure = ++c->nlogged;
    os_unlock(&c->queue_lock);
  }
  if (nth_failure > TX_LOGGED) return;
  const char *outcome = "ok";
  if (r->err) outcome = r->refused ? r->refused : u_errno_text(r->err);
  conn_log(c, level,
           "%d: %s (%u) flags=0x%x off=%" PRIu64 " len=%" PRIu64 ": %s%s",
           c->id, cmd ? cmd->name : "?", r->type, r->flags, r->client_off,
           r->len, outcome,
           nth_failure == TX_LOGGED ? "; further failures are not logged" : "");
}

/* Counts and logs what is answered; mostly before it is sent, so that a client
 * which has its reply finds it counted. */
static void tx_account(struct conn *c, const struct nbdserve_req *list) {
  struct nbdserve_stats *stats = &c->stats;
  const struct nbdserve_req *r;
  os_lock(&c->queue_lock);
  for (r = list; r; r = r->next) {
    stats->requests++;
    if (r->err) stats->errors++;
    if (!r->err && r->type == NBD_CMD_READ) stats->bytes_read += r->len;
    if (!r->err && r->type == NBD_CMD_WRITE) stats->bytes_written += r->len;
  }
  os_unlock(&c->queue_lock);
  for (r = list; r; r = r->next)
    tx_log(c, r);
}

/* Answers the requests of a list, which are DONE (T1), and frees the buffers
 * that they own.  0, or -errno when the client is gone. */
static int tx_answer(struct conn *c, struct nbdserve_req *list) {
  if (!list) return 0;
  assert(c->export);
  tx_account(c, list);
  int err = tx_send_all(c, list);
  for (; list; list = list->next)
    NBDSERVE_FREE(list->owned);
  return err;
}

/* ---- Executing ----------------------------------------------------------- */

/* Notes how a request went: DONE, or a flush is owed. */
static void tx_executed(struct conn *c, struct nbdserve_req *r, int err) {
  assert(r->state == REQ_TODO && err <= 0);
  r->err = err;
  int is_native = (c->export->pub.flags & NBDSERVE_EXPORT_NATIVE_FUA) != 0;
  int owes_flush = !err && !is_native && ex_wants_fua(c->export, r);
  req_set_state(r, owes_flush ? REQ_TO_FLUSH : REQ_DONE);
}

/* Flushes for all requests of a list, which are TO_FLUSH, in one go.  `before`
 * is asked for each FLUSH; one that it refuses takes no part. */
static void tx_flush(struct conn *c, struct nbdserve_req *list) {
  int wanted = 0;
  for (struct nbdserve_req *r = list; r; r = r->next) {
    assert(r->state == REQ_TO_FLUSH && !r->err);
    if (r->type == NBD_CMD_FLUSH) r->err = ex_ask_before(c->export, r);
    if (!r->err) wanted = 1;
  }
  int err = wanted ? ex_flush(c->export) : 0;
  for (struct nbdserve_req *r = list; r; r = r->next) {
    if (!r->err) r->err = err;
    req_set_state(r, REQ_DONE);
  }
}

/* Does a request, whatever is left to do of it: it is DONE afterwards. */
static void tx_execute(struct conn *c, struct nbdserve_req *r) {
  assert(!r->next);
  if (r->state == REQ_TODO) {
    int err = ex_ask_before(c->export, r);
    if (!err) err = ex_execute(c->export, r);
    tx_executed(c, r, err);
  }
  if (r->state == REQ_TO_FLUSH) tx_flush(c, r);
}

/* ---- Workers ----------------------------------------------------------------
 * They run while the client is in transmission: started one by one when there
 * is more to do than idle workers, up to max_workers. */

/* The client's thread waits for a worker to have answered something, or to end.
 * The caller holds queue_lock and looks again at what it waits for. */
static void tx_wait_for_worker(struct conn *c) {
  c->reader_waits = 1;
  os_wait(&c->queue_lock);
  c->reader_waits = 0;
}

/* Takes what a worker does next, waiting for it: one request, or all that wait
 * for a flush, as a list.  NULL: the connection ends and there is nothing left;
 * if flushes are left while another worker flushes, that one takes them next.
 * The caller holds queue_lock. */
static struct nbdserve_req *tx_take_work(struct conn *c) {
  for (;;) {
    if (c->to_flush && !c->flush_at_work) {
      struct nbdserve_req *list = c->to_flush;
      c->to_flush = NULL;
      c->flush_at_work = 1;
      return list;
    }
    if (c->queue) {
      struct nbdserve_req *r = c->queue;
      c->queue = r->next;
      if (!c->queue) c->queue_end = &c->queue;
      r->next = NULL;
      c->nqueue--;
      return r;
    }
    if (c->closing) return NULL;
    c->nidle++;
    os_wait(&c->queue_lock);
    c->nidle--;
  }
}

/* Frees what a worker has answered.  The caller holds queue_lock. */
static void tx_retire(struct conn *c, struct nbdserve_req *list) {
  while (list) {
    struct nbdserve_req *next = list->next;
    assert(list->state == REQ_DONE && c->nhanded_over > 0);
    NBDSERVE_FREE(list);
    c->nhanded_over--;
    list = next;
  }
  if (c->reader_waits) os_wake_all(&c->queue_lock);
}

/* A worker of a client: does and answers what is handed over until the client
 * has gone. */
static void *tx_worker(void *conn) {
  struct conn *c = conn;
  struct nbdserve_req *list;
  os_lock(&c->queue_lock);
  while ((list = tx_take_work(c)) != NULL) {
    int flushes = list->state == REQ_TO_FLUSH;
    os_unlock(&c->queue_lock);
    if (flushes)
      tx_flush(c, list);
    else
      tx_execute(c, list);
    tx_answer(c, list);
    os_lock(&c->queue_lock);
    if (flushes) c->flush_at_work = 0;
    tx_retire(c, list);
  }
  assert(c->nworkers > 0);
  c->nworkers--;
  if (c->reader_waits) os_wake_all(&c->queue_lock);
  os_unlock(&c->queue_lock);
  return NULL;
}

/* Sees to it that there is a worker for one more request, which is not queued
 * yet.  Jobs that wait are: each queued request, and all flushes together,
 * unless a flush is running, whose worker takes the next ones.  If these are
 * more than the workers that are idle, one is started.  Returns false if there
 * is none at all.  The caller holds queue_lock. */
static int tx_need_worker(struct conn *c, const struct nbdserve_req *r) {
  assert(c->nidle <= c->nworkers && c->nworkers <= c->max_workers);
  int flush = r->state == REQ_TO_FLUSH;
  unsigned jobs = c->nqueue + (flush ? 0 : 1);
  if (!c->flush_at_work && (c->to_flush || flush)) jobs++;
  if (jobs > c->nidle && c->nworkers < c->max_workers &&
      os_thread(tx_worker, c) == 0)
    c->nworkers++;
  return c->nworkers > 0;
}

/* Hands a request, which is TODO or TO_FLUSH, over to a worker: a copy of it,
 * and the buffer if the request owns it.  Waits while too many are handed over
 * (T5).  False: there is no worker, and the caller has to do it. */
static int tx_hand_over(struct conn *c, struct nbdserve_req *r) {
  assert(r->state == REQ_TODO || r->state == REQ_TO_FLUSH);
  if (!c->max_workers) return 0;
  struct nbdserve_req *copy = NBDSERVE_MALLOC(sizeof *copy);
  if (!copy) return 0;
  *copy = *r;
  copy->next = NULL;
  /* A request whose data lies in rbuf or wbuf was executed; it only owes a
   * flush, which needs no data. */
  if (!copy->owned) copy->buf = NULL;
  os_lock(&c->queue_lock);
  while (c->nhanded_over >= c->max_handed_over)
    tx_wait_for_worker(c);
  if (!tx_need_worker(c, copy)) {
    os_unlock(&c->queue_lock);
    NBDSERVE_FREE(copy);
    return 0;
  }
  if (copy->state == REQ_TO_FLUSH) {
    copy->next = c->to_flush;
    c->to_flush = copy;
  } else {
    *c->queue_end = copy;
    c->queue_end = &copy->next;
    c->nqueue++;
  }
  c->nhanded_over++;
  os_wake_one(&c->queue_lock); /* a worker: this thread does not wait */
  os_unlock(&c->queue_lock);
  req_set_state(r, REQ_HANDED_OVER);
  return 1;
}

/* Waits until no request is with a worker: none of their replies comes between
 * the pieces of one that follows. */
static void tx_wait_for_workers(struct conn *c) {
  os_lock(&c->queue_lock);
  while (c->nhanded_over > 0)
    tx_wait_for_worker(c);
  os_unlock(&c->queue_lock);
}

/* Ends the workers, when they have done what is left (DRAINING). */
static void tx_end_workers(struct conn *c) {
  os_lock(&c->queue_lock);
  c->closing = 1;
  os_wake_all(&c->queue_lock);
  while (c->nworkers > 0)
    tx_wait_for_worker(c);
  assert(!c->queue && !c->to_flush && !c->nhanded_over);
  os_unlock(&c->queue_lock);
}

/* ---- The batch ----------------------------------------------------------- */

/* Does what is TODO of the batch, or hands over what is for workers (T4).
 * READs and WRITEs that stand in a row are done with one call of run_batch. */
static void tx_run_requests(struct conn *c) {
  size_t i = 0;
  while (i < c->nbatch) {
    struct nbdserve_req *r = &c->batch[i++];
    if (r->state != REQ_TODO) continue;
    if (!c->run_batch || !req_moves_data(r)) {
      int given = !req_moves_data(r) && tx_hand_over(c, r);
      if (!given) tx_execute(c, r);
      continue;
    }
    while (i < c->nbatch && c->batch[i].state == REQ_TODO &&
           req_moves_data(&c->batch[i]))
      i++;
    c->run_batch(c->export->pub.ctx, r, (size_t)(&c->batch[i] - r));
    for (; r < &c->batch[i]; r++)
      tx_executed(c, r, r->err);
  }
}

/* Does the batch, or hands it over, and answers it.  0, or -errno to close. */
static int tx_run_batch(struct conn *c) {
  struct nbdserve_req *list = NULL;
  struct nbdserve_req **end = &list;
  if (!c->nbatch) return 0;
  tx_run_requests(c);
  for (size_t i = 0; i < c->nbatch; i++) {
    struct nbdserve_req *r = &c->batch[i];
    if (r->state == REQ_TO_FLUSH && !tx_hand_over(c, r))
      tx_execute(c, r); /* (T3): only now */
    if (r->state == REQ_HANDED_OVER) continue;
    *end = r;
    end = &r->next;
  }
  c->nbatch = 0;
  c->wbuf_used = 0;
  return tx_answer(c, list);
}

/* Adds a request to the batch, which is run first if there is no room.  A READ
 * gets a slot in wbuf.  0, or -errno to close. */
static int tx_add_to_batch(struct conn *c, const struct nbdserve_req *r) {
  size_t slot = 0;
  if (r->type == NBD_CMD_READ && r->state == REQ_TODO)
    slot = wire_read_head_len(c->mode) + (size_t)r->len;
  assert(slot <= CONN_WBUF);
  if (c->nbatch == TX_BATCH || c->wbuf_used + slot > CONN_WBUF) {
    int err = tx_run_batch(c);
    if (err) return err;
  }
  struct nbdserve_req *place = &c->batch[c->nbatch++];
  *place = *r;
  c->wbuf_used += slot;
  if (slot) place->buf = c->wbuf + c->wbuf_used - r->len;
  return 0;
}

/* ---- What is not done in the batch ------------------------------------------
 * These run when the batch is done, so all of rbuf is free but the payload of
 * this request, of which the first bytes may have come. */

/* Receives n bytes of a payload: those that are in rbuf, then from the
 * socket. */
static int tx_recv_payload(struct conn *c, unsigned char *to, size_t n) {
  assert(c->rbuf_pos <= c->rbuf_end && !c->nbatch);
  size_t here = (size_t)u_min(n, c->rbuf_end - c->rbuf_pos);
  memcpy(to, c->rbuf + c->rbuf_pos, here);
  c->rbuf_pos += here;
  return n > here ? io_recv_all(&c->io, to + here, n - here) : 0;
}

/* Hands a request over if something is left to do of it, or does it and
 * answers.  Returns 0, or -errno to close. */
static int tx_finish(struct conn *c, struct nbdserve_req *r) {
  if (r->state != REQ_DONE) {
    if (tx_hand_over(c, r)) return 0;
    tx_execute(c, r);
  }
  return tx_answer(c, r);
}

/* Does a long WRITE, piece by piece as they come, or only receives the payload
 * of a request that was refused.  After an error the rest is thrown away. */
static int tx_write_in_pieces(struct conn *c, struct nbdserve_req *r,
                              uint64_t payload) {
  struct nbdserve_req piece = *r;
  int is_refused = r->state == REQ_DONE;
  int failed = is_refused ? r->err : ex_ask_before(c->export, r);
  assert(is_refused || payload == r->len);
  piece.buf = c->piece_buf;
  c->after_long_write = 1;
  for (; payload > 0; payload -= piece.len) {
    piece.len = u_min(payload, TX_PIECE);
    int err = tx_recv_payload(c, piece.buf, (size_t)piece.len);
    if (err) return err;
    if (!failed) failed = ex_execute(c->export, &piece);
    piece.off += piece.len;
  }
  if (!is_refused) tx_executed(c, r, failed);
  return tx_finish(c, r);
}

/* Reads the next piece of a long READ, from off on, into piece_buf. */
static int tx_read_piece(struct conn *c, const struct nbdserve_req *r,
                         uint64_t off, struct nbdserve_req *piece) {
  uint64_t end = r->off + r->len;
  *piece = *r;
  piece->buf = c->piece_buf + TX_HEAD_ROOM;
  piece->off = off;
  piece->len = u_min(end - off, TX_PIECE);
  piece->more_chunks = off + piece->len < end;
  /* proto.md: chunks should end at multiples of 512, where possible. */
  if (piece->more_chunks) piece->len -= (off + piece->len) % 512;
  assert(piece->len > 0 && off + piece->len <= end);
  tx_executed(c, piece, ex_execute(c->export, piece));
  return piece->err;
}

/* Reads all of a long READ and keeps nothing: what fails now can still be said
 * in a simple reply, whose head claims success before the data comes. */
static int tx_try_read(struct conn *c, const struct nbdserve_req *r) {
  struct nbdserve_req piece;
  int err = 0;
  for (uint64_t off = r->off; off < r->off + r->len && !err; off += piece.len)
    err = tx_read_piece(c, r, off, &piece);
  return err;
}

/* Reads and sends a long READ, piece by piece: as chunks of a structured reply,
 * or as one simple reply, after tx_try_read.  If there are several pieces, an
 * error says at which. */
static int tx_read_in_pieces(struct conn *c, struct nbdserve_req *r) {
  int is_simple = r->mode == MODE_SIMPLE;
  uint64_t off = r->off;
  int err = ex_ask_before(c->export, r);
  if (!err && is_simple && r->len > TX_PIECE) {
    tx_wait_for_workers(c); /* a simple reply is in one piece */
    err = tx_try_read(c, r);
  }
  while (!err && off < r->off + r->len) {
    struct nbdserve_req piece;
    err = tx_read_piece(c, r, off, &piece);
    /* A simple reply that has begun cannot be taken back (proto.md). */
    if (err && is_simple && off > r->off) return err;
    if (err) break;
    int send_err = tx_send_all(c, &piece);
    if (send_err) return send_err;
    off += piece.len;
  }
  r->err = err;
  r->err_has_off = r->len > TX_PIECE;
  r->err_off = off;
  req_set_state(r, REQ_DONE);
  if (err) return tx_answer(c, r);
  tx_account(c, r); /* all was sent */
  return 0;
}

/* Does what needs the buffer for pieces: a long READ, or what has a long
 * payload.  A connection for which there is not even a megabyte is closed. */
static int tx_in_pieces(struct conn *c, struct nbdserve_req *r,
                        uint64_t payload) {
  if (!c->piece_buf) c->piece_buf = NBDSERVE_MALLOC(TX_HEAD_ROOM + TX_PIECE);
  if (!c->piece_buf) return -ENOMEM;
  return payload ? tx_write_in_pieces(c, r, payload) : tx_read_in_pieces(c, r);
}

/* Gives a READ or WRITE a buffer of its own and hands it over, with its
 * payload.  Without memory it is done in pieces, as if it were longer. */
static int tx_copied(struct conn *c, struct nbdserve_req *r, uint64_t payload) {
  assert(!c->run_batch && r->state == REQ_TODO && r->len <= TX_PIECE);
  r->owned = NBDSERVE_MALLOC(TX_HEAD_ROOM + (size_t)r->len);
  if (!r->owned) return tx_in_pieces(c, r, payload);
  r->buf = (unsigned char *)r->owned + TX_HEAD_ROOM;
  int err = payload ? tx_recv_payload(c, r->buf, (size_t)payload) : 0;
  if (!err) return tx_finish(c, r);
  NBDSERVE_FREE(r->owned);
  return err;
}

/* ---- Taking requests ----------------------------------------------------- */

/* Refuses a request: it is not done, and answered with that error, which is
 * returned. */
static int tx_refuse(struct nbdserve_req *r, int err, const char *why) {
  assert(err < 0 && why);
  r->err = err;
  r->refused = why;
  req_set_state(r, REQ_DONE);
  return err;
}

/* The transmission flags without which a request is not possible. */
static unsigned tx_needed_flags(const struct nbdserve_req *r,
                                const struct wire_cmd *cmd) {
  unsigned needed = cmd->exposed_by;
  if (r->flags & NBD_CMD_FLAG_FUA) needed |= NBD_FLAG_SEND_FUA;
  if (r->flags & NBD_CMD_FLAG_DF) needed |= NBD_FLAG_SEND_DF;
  if (r->flags & NBD_CMD_FLAG_FAST_ZERO) needed |= NBD_FLAG_SEND_FAST_ZERO;
  if (r->type == NBD_CMD_BLOCK_STATUS && r->flags & NBD_CMD_FLAG_PAYLOAD_LEN)
    needed |= NBD_FLAG_BLOCK_STATUS_PAYLOAD;
  return needed;
}

/* Checks a request against all that was negotiated: one rule, one `if`; the
 * first that is broken counts.  A new rule goes here.  0, or -errno if the
 * request was refused. */
static int tx_validate(const struct conn *c, struct nbdserve_req *r,
                       uint64_t payload) {
  const struct nbdserve_export *e = &c->export->pub;
  const struct wire_cmd *cmd = wire_cmd(r->type);
  if (!cmd) return tx_refuse(r, -EINVAL, "unknown command");
  unsigned lacking = tx_needed_flags(r, cmd) & ~c->transmission_flags;
  unsigned stray = r->flags & ~(unsigned)(cmd->flags | NBD_CMD_FLAG_FUA);
  if (c->mode != MODE_EXTENDED) stray |= r->flags & NBD_CMD_FLAG_PAYLOAD_LEN;
  int is_status = r->type == NBD_CMD_BLOCK_STATUS;
  int has_range = cmd->err_beyond != 0;
  if (stray & NBD_CMD_FLAG_PAYLOAD_LEN ||
      lacking & NBD_FLAG_BLOCK_STATUS_PAYLOAD)
    return tx_refuse(r, -EINVAL, "it takes no payload");
  if (cmd->writes && (c->transmission_flags & NBD_FLAG_READ_ONLY))
    return tx_refuse(r, -EPERM, "the export is read-only");
  if (r->type == NBD_CMD_WRITE && payload != r->len)
    return tx_refuse(r, -EINVAL, "NBD_CMD_FLAG_PAYLOAD_LEN is missing");
  if (has_range &&
      (r->off > c->export_size || r->len > c->export_size - r->off))
    return tx_refuse(r, cmd->err_beyond, "beyond the end of the export");
  if (is_status && !c->has_allocation)
    return tx_refuse(r, -EINVAL, "no metadata context was negotiated");
  if (lacking) return tx_refuse(r, -EINVAL, "the export does not offer it");
  if (stray) return tx_refuse(r, -EINVAL, "flag does not apply");
  if (has_range && (r->off | r->len) & (e->min_block - 1))
    return tx_refuse(r, -EINVAL, "no multiple of the minimum block size");
  if (cmd->has_data && r->len > e->max_request)
    return tx_refuse(r, -EINVAL, "longer than the maximum payload size");
  if (is_status && !r->len)
    return tx_refuse(r, -EINVAL, "nothing to report on");
  if (r->flags & NBD_CMD_FLAG_DF && r->len > TX_PIECE)
    return tx_refuse(r, -EOVERFLOW, "too long for a single chunk");
  return 0;
}

/* Does a request, or sees to it that it is done later, as the table at the head
 * of the section says.  0, or -errno to close. */
static int tx_dispatch(struct conn *c, struct nbdserve_req *r,
                       uint64_t payload) {
  int moves_data = r->state == REQ_TODO && req_moves_data(r);
  int is_copied =
      moves_data && !c->run_batch && c->max_workers && r->len <= TX_PIECE;
  uint64_t data = moves_data ? r->len : payload; /* of a READ, too */
  if (!is_copied && data <= TX_IN_BATCH_MAX) {
    r->buf = c->rbuf + c->rbuf_pos; /* the payload is all there */
    c->rbuf_pos += (size_t)payload;
    return tx_add_to_batch(c, r);
  }
  int err = tx_run_batch(c); /* answers what came before, and frees rbuf */
  if (err) return err;
  return is_copied ? tx_copied(c, r, payload) : tx_in_pieces(c, r, payload);
}

/* How many bytes of payload follow the head of a request. */
static uint64_t tx_payload_len(const struct nbdserve_req *r) {
  if (r->mode == MODE_EXTENDED)
    return r->flags & NBD_CMD_FLAG_PAYLOAD_LEN ? r->len : 0;
  return r->type == NBD_CMD_WRITE ? r->len : 0;
}

/* Is that a request, with a payload that can be skipped at least? */
static int tx_is_framed(const struct conn *c, uint32_t magic,
                        uint64_t payload) {
  if (c->mode == MODE_EXTENDED)
    return magic == NBD_EXTENDED_REQUEST_MAGIC &&
           payload <= c->export->pub.max_request;
  return magic == NBD_REQUEST_MAGIC && payload <= NBDSERVE_MAX_REQUEST;
}

/* Takes the next request out of rbuf.  As enum conn_step says. */
static int tx_next_request(struct conn *c) {
  const unsigned char *p = c->rbuf + c->rbuf_pos;
  assert(c->rbuf_pos <= c->rbuf_end && c->nbatch <= TX_BATCH);
  size_t here = c->rbuf_end - c->rbuf_pos;
  size_t head = wire_request_len(c->mode);
  c->needed = head;
  if (here < head) return CONN_NEEDS_MORE;
  struct nbdserve_req r = wire_get_request(p, c->mode);
  uint64_t payload = tx_payload_len(&r);
  if (!tx_is_framed(c, u_get32(p), payload)) {
    int err = tx_run_batch(c); /* what came before is answered */
    conn_log(c, NBDSERVE_LOG_INFO,
             "%d: request magic 0x%08" PRIx32 ", %" PRIu64
             " bytes of payload; closed",
             c->id, u_get32(p), payload);
    return err ? err : -EPROTO;
  }
  if (r.type == NBD_CMD_DISC) return CONN_LEFT;
  if (payload <= TX_IN_BATCH_MAX) c->needed += (size_t)payload;
  if (here < c->needed) return CONN_NEEDS_MORE;
  if (r.type == NBD_CMD_FLUSH) r.off = r.len = 0; /* reserved (proto.md) */
  if (r.type == NBD_CMD_BLOCK_STATUS && payload)
    r.len = wire_get_status_len(p + head, payload); /* 0 is refused */
  if (!tx_validate(c, &r, payload) && !r.len) /* only a flush, or nothing */
    req_set_state(&r, r.type == NBD_CMD_FLUSH ? REQ_TO_FLUSH : REQ_DONE);
  c->rbuf_pos += head;
  return tx_dispatch(c, &r, payload);
}

/* Receives more, behind what is left in rbuf, until the next request is there.
 * The batch is empty: the payloads of its WRITEs lay there.  0, CONN_LEFT or
 * -errno. */
static int tx_receive(struct conn *c) {
  size_t left = c->rbuf_end - c->rbuf_pos;
  size_t room = CONN_RBUF - left;
  assert(c->rbuf_pos <= c->rbuf_end && c->rbuf_end <= CONN_RBUF);
  assert(!c->nbatch && !c->wbuf_used && left < c->needed);
  if (c->rbuf_pos) memmove(c->rbuf, c->rbuf + c->rbuf_pos, left);
  c->rbuf_pos = 0;
  c->rbuf_end = left;
  /* Behind a long WRITE another one is likely.  Its payload is received where
   * it is written from; what comes along with its head would have to be copied
   * there. */
  if (c->after_long_write) room = TX_AFTER_LONG_WRITE;
  assert(!c->after_long_write || !left); /* that took all that was there */
  c->after_long_write = 0;
  size_t least = left ? c->needed - left : 1; /* all of it may stay away */
  ssize_t n = io_recv(&c->io, c->rbuf + left, least, room);
  if (!left && n == -ETIMEDOUT) {
    /* Idle, as long as it likes; unless a worker could not send to it, which
     * shutdown() tells us only if the replies go over the same socket. */
    return tx_send(c, NULL, 0);
  }
  if (!left && c->io.at_end) return CONN_LEFT;
  if (n < 0) return (int)n;
  assert((size_t)n <= room);
  c->rbuf_end += (size_t)n;
  return 0;
}

/* The transmission phase, to its end: CONN_LEFT or -errno.  After an error the
 * requests of a batch that was not run are dropped. */
static int tx_run(struct conn *c) {
  int step;
  assert(c->export && !c->nbatch && !c->wbuf_used && !c->io.deadline);
  do {
    step = tx_next_request(c);
    if (step > 0) {
      int err = tx_run_batch(c);
      if (err) step = err;
    }
    if (step == CONN_NEEDS_MORE) step = tx_receive(c);
  } while (!step);
  tx_end_workers(c);
  return step;
}

/* ==== [10] FLAT (flat_) ==================================================
 * A regular file, a block device or memory, served as it is.  Here the file is
 * called the target, even if it is a device or in memory.
 *
 *   export      0 ................................ size
 *   target      offset .................. offset + size
 *   overlay     0 [64 KiB] [64 KiB] [64 KiB] [...] size
 *
 * Only a temporary export (NBDSERVE_FLAT_TEMPORARY) has an overlay, a file
 * without a name.  Its target is only read.  The first write to a block brings
 * the whole block to the overlay; from then on the block is read and written
 * there.  What is not in the overlay is read from the target.  The functions
 * that know of blocks begin with overlay_.
 *
 * Requests: READ and WRITE come to flat_batch, in the client's thread and many
 * at a time; the others come one by one to a method of flat_ops, in threads
 * that may wait.  Their ranges are inside the export (E2).
 *
 * (F1) After a failed fdatasync the kernel may have dropped what it could not
 *      write, and the next fdatasync says that all is well.  So the first
 *      failure is for good: every later write and flush fails with EIO until
 *      the file is opened anew.
 * (F2) A call that a system, a file system or a sandbox may lack is tried until
 *      it first says so; from then on the portable way is taken.
 * (F3) Nothing here depends on the offset of a descriptor, so any number of
 *      threads may call at once.
 * (F4) If nbdserve_flat_open fails, it removes the file that it has made. */
#if !NBDSERVE_NO_FLAT

enum {
  FLAT_MAX_IOV = 64, /* neighbouring requests that go into one system call */
  FLAT_OVERLAY_BLOCK = 65536, /* bytes that come to the overlay as a whole */
  FLAT_FAILED = 1 << 30       /* a sync has failed (F1) */
};

/* An open export: nbdserve_flat_open makes it, flat_close frees it.
 *
 *   members         written by          read by                  lock
 *   own ... size    nbdserve_flat_open  everybody                none
 *   known           FLUSH, TRIM, ZEROES  all that writes          lock
 *   in_overlay      WRITE               READ, WRITE              lock
 *
 * The lock is held for the moment that it takes to look, except for in_overlay:
 * see there. */
struct flat {
  struct ex_batched own; /* must come first: ex_batched_read looks there */

  /* Fixed while the export is open: no lock is needed. */
  int fd;          /* the target; ours to close */
  int overlay_fd;  /* the overlay, ours to close; -1: writes go to the target */
  int follows_end; /* the export ends where the target ends, even if it grows */
  uint64_t offset; /* bytes of the target in front of the export */
  uint64_t size;   /* bytes of the export when it was opened */

  struct os_monitor lock; /* guards all that follows */
  unsigned known;         /* FLAT_FAILED, and a bit for each mode of
                             os_fallocate that is missing: see flat_known */
  /* Bit N % 8 of byte N / 8: block N is in the overlay.  A READ or WRITE holds
   * the lock from its look at the bits to the end of its I/O: another WRITE
   * could bring the block over in between, and one of the two would be lost.
   * NULL: there is no overlay. */
  unsigned char *in_overlay;
};
STATIC_ASSERT(modes_of_fallocate_have_bits, OS_FALLOCATE_MODES <= 30);

/* Do writes go to the overlay?  Then no request changes the target. */
static int flat_is_temporary(const struct flat *f) {
  return f->overlay_fd >= 0;
}

/* ---- What has failed before ---------------------------------------------- */

/* Adds bits for good to what an export has learned so far, and returns all of
 * it: FLAT_FAILED, and 1 << mode for each mode that os_fallocate lacks here
 * (F2).  Takes the lock. */
static unsigned flat_learn(struct flat *f, unsigned bits) {
  os_lock(&f->lock);
  f->known |= bits;
  unsigned known = f->known;
  os_unlock(&f->lock);
  return known;
}

/* What an export has learned so far.  Takes the lock. */
static unsigned flat_known(struct flat *f) {
  return flat_learn(f, 0);
}

/* ---- The overlay of a temporary export ---------------------------------- */

/* Is a block in the overlay?  The caller holds the lock. */
static int overlay_has(const struct flat *f, uint64_t block) {
  assert(block <= f->size / FLAT_OVERLAY_BLOCK);
  return f->in_overlay[block / 8] >> block % 8 & 1;
}

/* Notes that a block is in the overlay.  The caller holds the lock. */
static void overlay_add(struct flat *f, uint64_t block) {
  assert(block <= f->size / FLAT_OVERLAY_BLOCK);
  f->in_overlay[block / 8] |= (unsigned char)(1 << block % 8);
}

/* Brings a block to the overlay, of which len bytes at off have the new data at
 * buf and the others are as in the target.  The last block of an export may be
 * shorter than the others.  The caller holds the lock. */
static int overlay_write_first(struct flat *f, const void *buf, uint64_t off,
                               size_t len) {
  unsigned char block[FLAT_OVERLAY_BLOCK];
  size_t skip = (size_t)(off % FLAT_OVERLAY_BLOCK);
  uint64_t start = off - skip;
  size_t block_len = (size_t)u_min(sizeof block, f->size - start);
  assert(skip + len <= block_len);
  if (len < block_len) {
    struct iovec old = {block, block_len};
    int err = os_transfer(f->fd, OS_READ, &old, 1, f->offset + start);
    if (err) return err;
  }
  memcpy(block + skip, buf, len);
  struct iovec v = {block, block_len};
  int err = os_transfer(f->overlay_fd, OS_WRITE, &v, 1, start);
  if (err) return err; /* the target's block still counts */
  overlay_add(f, off / FLAT_OVERLAY_BLOCK);
  return 0;
}

/* Reads or writes len bytes at off, all in one block, where that block is or,
 * after a write, has to be.  The caller holds the lock. */
static int overlay_do_piece(struct flat *f, int writing, void *buf,
                            uint64_t off, size_t len) {
  struct iovec v = {buf, len};
  if (overlay_has(f, off / FLAT_OVERLAY_BLOCK))
    return os_transfer(f->overlay_fd, writing, &v, 1, off);
  if (writing) return overlay_write_first(f, buf, off, len);
  return os_transfer(f->fd, OS_READ, &v, 1, f->offset + off);
}

/* Does a READ or WRITE block by block, with the lock from the first to the
 * last.  Returns 0 or the first error. */
static int overlay_do(struct flat *f, const struct nbdserve_req *r) {
  int err = 0;
  assert(r->len <= f->size && r->off <= f->size - r->len);
  os_lock(&f->lock);
  for (uint64_t done = 0, len; done < r->len && !err; done += len) {
    uint64_t off = r->off + done;
    len = u_min(FLAT_OVERLAY_BLOCK - off % FLAT_OVERLAY_BLOCK, r->len - done);
    err = overlay_do_piece(f, r->type == NBD_CMD_WRITE, r->buf + done, off,
                           (size_t)len);
  }
  os_unlock(&f->lock);
  return err;
}

/* ---- Requests ----------------------------------------------------------- */

/* Returns how many of the first requests are of one type and lie one behind the
 * other, so that one system call can do them all. */
static size_t flat_run_length(const struct nbdserve_req *reqs, size_t nreqs) {
  size_t most = nreqs < FLAT_MAX_IOV ? nreqs : FLAT_MAX_IOV;
  assert(nreqs > 0);
  for (size_t n = 1; n < most; n++) {
    const struct nbdserve_req *last = &reqs[n - 1];
    if (reqs[n].type != last->type) return n;
    if (reqs[n].off != last->off + last->len) return n;
  }
  return most;
}

/* Does a run of requests with one system call, or more if that does less. */
static int flat_transfer(struct flat *f, const struct nbdserve_req *reqs,
                         size_t nreqs) {
  struct iovec v[FLAT_MAX_IOV];
  int writing = reqs->type == NBD_CMD_WRITE;
  assert(nreqs > 0 && nreqs <= FLAT_MAX_IOV);
  if (writing && flat_known(f) & FLAT_FAILED) return -EIO; /* (F1) */
  for (size_t i = 0; i < nreqs; i++) {
    v[i].iov_base = reqs[i].buf;
    v[i].iov_len = (size_t)reqs[i].len;
    assert(v[i].iov_len == reqs[i].len); /* there is a buffer of that size */
  }
  return os_transfer(f->fd, writing, v, (int)nreqs, f->offset + reqs->off);
}

/* Does READs and WRITEs, in their order, in the caller's thread, and sets the
 * error of each: the method of struct ex_batched.
 *
 * Clients that read or write a long range often cut it into requests that lie
 * one behind the other; such a run becomes one system call.  If it fails they
 * are repeated one by one, so that only those fail that fail by themselves. */
static void flat_batch(void *ctx, struct nbdserve_req *reqs, size_t nreqs) {
  struct flat *f = ctx;
  if (flat_is_temporary(f)) {
    for (size_t i = 0; i < nreqs; i++)
      reqs[i].err = overlay_do(f, &reqs[i]);
    return;
  }
  for (size_t run; nreqs > 0; reqs += run, nreqs -= run) {
    assert(reqs->type == NBD_CMD_READ || reqs->type == NBD_CMD_WRITE);
    run = flat_run_length(reqs, nreqs);
    int err = flat_transfer(f, reqs, run);
    for (size_t i = 0; i < run; i++)
      reqs[i].err = err && run > 1 ? flat_transfer(f, &reqs[i], 1) : err;
  }
}

/* Makes all that was written durable, or fails for good (F1).  A temporary
 * export has nothing that should last. */
static int flat_flush(void *ctx, uint32_t flags) {
  (void)flags;
  struct flat *f = ctx;
  if (flat_is_temporary(f)) return 0;
  if (flat_known(f) & FLAT_FAILED) return -EIO;
  int err = os_datasync(f->fd);
  if (err) flat_learn(f, FLAT_FAILED);
  return err;
}

/* Changes the space behind a range of the export.  -EOPNOTSUPP: the caller must
 * do without, now (the range is not made of whole sectors of a device) or, as
 * is then remembered, always (F2). */
static int flat_allocate(struct flat *f, int mode, uint64_t off, uint64_t len) {
  if (flat_is_temporary(f)) return -EOPNOTSUPP; /* the target stays */
  assert(mode >= 0 && mode < OS_FALLOCATE_MODES);
  unsigned known = flat_known(f);
  if (known & FLAT_FAILED) return -EIO; /* (F1): it is a write */
  if (known & 1u << mode) return -EOPNOTSUPP;
  int err = os_fallocate(f->fd, mode, f->offset + off, len);
  if (err == -EOPNOTSUPP) flat_learn(f, 1u << mode); /* (F2) */
  return err == -EINVAL ? -EOPNOTSUPP : err;
}

/* Gives the space behind a range back. */
static int flat_trim(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  (void)flags;
  int err = flat_allocate(ctx, OS_PUNCH_HOLE, off, len);
  return err == -EOPNOTSUPP ? 0 : err; /* a trim may do nothing */
}

/* Makes a range read as zeroes, without space if that is allowed and possible.
 * -ENOTSUP: nothing here is faster than to write the zeroes. */
static int flat_zero(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  int err = -EOPNOTSUPP;
  if (!(flags & NBDSERVE_CMD_NO_HOLE))
    err = flat_allocate(ctx, OS_PUNCH_HOLE, off, len);
  if (err == -EOPNOTSUPP) err = flat_allocate(ctx, OS_ZERO_RANGE, off, len);
  return err == -EOPNOTSUPP ? -ENOTSUP : err;
}

/* Brings a range of the target into the system's memory, if the system chooses
 * to. */
static int flat_cache(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  (void)flags;
  struct flat *f = ctx;
  os_willneed(f->fd, f->offset + off, len);
  return 0;
}

/* Reports data and holes.  Of a temporary export nothing is reported, which
 * means that all is data: a hole of the target may have been written, and what
 * the overlay holds is not worth the time to look. */
static int flat_extents(void *ctx, uint64_t off, uint64_t len, uint32_t flags,
                        struct nbdserve_extents *out) {
  (void)flags;
  struct flat *f = ctx;
  uint64_t pos = f->offset + off;
  uint64_t end = pos + len;
  uint64_t next;
  if (flat_is_temporary(f)) return 0;
  for (; pos < end; pos = next) {
    int is_data = os_is_data(f->fd, pos, end, &next);
    uint32_t status = NBDSERVE_EXTENT_HOLE | NBDSERVE_EXTENT_ZERO;
    if (nbdserve_extent(out, next - pos, is_data ? 0 : status)) break;
  }
  return 0;
}

/* The size that a new client gets.  size: what the export has so far, maybe by
 * nbdserve_resize. */
static uint64_t flat_size(void *ctx, uint64_t size) {
  struct flat *f = ctx;
  /* The overlay's map has no bits for more than there was. */
  if (flat_is_temporary(f)) return u_min(size, f->size);
  /* An offset in the target must not exceed what off_t holds. */
  if (!f->follows_end) return u_min(size, INT64_MAX - f->offset);
  off_t end = lseek(f->fd, 0, SEEK_END);
  if (end < 0) return size;
  return (uint64_t)end < f->offset ? 0 : (uint64_t)end - f->offset;
}

/* Ends an export.  Nothing is left that could fail: what has to last was
 * flushed before. */
static void flat_close(void *ctx) {
  struct flat *f = ctx;
  close(f->fd);
  if (flat_is_temporary(f)) close(f->overlay_fd);
  NBDSERVE_FREE(f->in_overlay);
  os_monitor_free(&f->lock);
  NBDSERVE_FREE(f);
}

/* Reads and writes come from flat_batch, by way of ex_batched_read and _write
 * if they are single. */
static const struct nbdserve_ops flat_ops = {
    .read = ex_batched_read,
    .write = ex_batched_write,
    .flush = flat_flush,
    .trim = flat_trim,
    .zero = flat_zero,
    .cache = flat_cache,
    .extents = flat_extents,
    .close = flat_close,
    .run_batch = flat_batch,
    .size = flat_size,
};

/* ---- Opening ------------------------------------------------------------
 * One function a step; each fills its part of struct flat.  The lock comes
 * before all that looks at the file or changes it, so that of several servers
 * that start at once exactly one does. */

/* What the steps need to know. */
struct flat_opening {
  struct flat *f;   /* the export that is being made */
  const char *path; /* as the caller gave it */
  const struct nbdserve_flat *options;
  int is_memory;   /* path is mem:SIZE, else a name in the file system */
  int writable;    /* clients' writes go to the target */
  int is_new;      /* this call made the file, and has it locked: (F4) */
  uint64_t create; /* size for a new or empty file; 0: none is made */
};

/* Looks at the options, and at a path that is mem:SIZE.  -EINVAL. */
static int flat_check_options(struct flat_opening *t) {
  static const char prefix[] = "mem:";
  if (t->options->flags & ~(NBDSERVE_FLAT_READONLY | NBDSERVE_FLAT_TEMPORARY))
    return -EINVAL;
  t->writable = !t->options->flags;
  t->create = t->options->create;
  t->is_memory = strncmp(t->path, prefix, strlen(prefix)) == 0;
  if (t->is_memory &&
      !u_parse_number(t->path + strlen(prefix), INT64_MAX, &t->create))
    return -EINVAL;
  return t->create > INT64_MAX ? -EINVAL : 0;
}

/* Opens the target, and makes the file if it is missing and may be made.  Only
 * O_EXCL tells whether this call has made it, which (F4) must know; it follows
 * no link to where nothing is yet.  A new file is opened for writing in any
 * case, as it gets its size. */
static int flat_open_target(struct flat_opening *t) {
  int flags = O_CLOEXEC | O_NOCTTY | O_NONBLOCK; /* a FIFO must not block */
  int fd = -1;
  if (t->is_memory) {
    t->f->fd = os_nameless_file(NULL);
    return t->f->fd < 0 ? t->f->fd : 0;
  }
  if (t->create) {
    fd = open(t->path, flags | O_RDWR | O_CREAT | O_EXCL, 0666);
    if (fd < 0 && errno != EEXIST) return -errno;
    t->is_new = fd >= 0;
  }
  if (fd < 0) fd = open(t->path, flags | (t->writable ? O_RDWR : O_RDONLY));
  t->f->fd = fd;
  return fd < 0 ? -errno : 0;
}

/* Keeps other servers away from the target.  Refuses what is neither a file nor
 * a block device, and a device that is to be written and cannot.  Gives a new
 * or empty file its size.
 *
 * If another server was quicker to lock the file that this call has just made,
 * or the file has a size by now, which another one gave it that has ended, then
 * the file and its data are no longer ours. */
static int flat_prepare_target(struct flat_opening *t) {
  struct stat st = {0};
  int fd = t->f->fd;
  int err = os_lock_file(fd, !t->writable);
  if (!err && fstat(fd, &st) < 0) err = -errno;
  if (err || st.st_size != 0) t->is_new = 0;
  if (err) return err;
  if (S_ISDIR(st.st_mode)) return -EISDIR;
  if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) return -EINVAL;
  if (S_ISBLK(st.st_mode) && t->writable && os_is_readonly_device(fd))
    return -EROFS;
  if (!t->create || !S_ISREG(st.st_mode) || st.st_size != 0) return 0;
  if (ftruncate(fd, (off_t)t->create) < 0) return -errno;
  return t->is_memory ? 0 : os_sync_new_file(fd, t->path);
}

/* Settles which part of the target is served.  -EINVAL: it is not inside. */
static int flat_find_slice(struct flat *f,
                           const struct nbdserve_flat *options) {
  off_t end = lseek(f->fd, 0, SEEK_END);
  if (end < 0) return -errno;
  if (options->offset > (uint64_t)end) return -EINVAL;
  uint64_t most = (uint64_t)end - options->offset;
  if (options->size > most) return -EINVAL;
  f->offset = options->offset;
  f->size = options->size ? options->size : most;
  f->follows_end = !options->size;
  assert(f->offset + f->size <= INT64_MAX); /* for os_transfer */
  return 0;
}

/* Makes the overlay of a temporary export in dir.  -EFBIG: its map would have
 * more bytes than `most`, which is what size_t holds: on a machine with
 * addresses of 32 bits a sparse file may well be too large. */
static int flat_make_overlay(struct flat *f, const char *dir, size_t most) {
  uint64_t len = f->size / FLAT_OVERLAY_BLOCK / 8 + 1;
  if (len > most) return -EFBIG;
  f->in_overlay = u_zalloc((size_t)len);
  if (!f->in_overlay) return -ENOMEM;
  f->overlay_fd = os_nameless_file(dir);
  return f->overlay_fd < 0 ? f->overlay_fd : 0;
}

/* See nbdserve.h.  If it fails a file that it has made goes first, while the
 * lock still keeps others from taking it (F4). */
int nbdserve_flat_open(const char *path, const struct nbdserve_flat *options,
                       struct nbdserve_export *out) {
  static const struct nbdserve_flat defaults;
  if (!options) options = &defaults;
  struct flat *f = u_zalloc(sizeof *f);
  struct flat_opening t = {.f = f, .path = path, .options = options};
  int err = f ? os_monitor_init(&f->lock) : -ENOMEM;
  if (err) {
    NBDSERVE_FREE(f);
    return err;
  }
  f->own.run_batch = flat_batch;
  f->fd = f->overlay_fd = -1;
  err = flat_check_options(&t);
  if (!err) err = flat_open_target(&t);
  if (!err) err = flat_prepare_target(&t);
  if (!err) err = flat_find_slice(f, options);
  if (!err && (options->flags & NBDSERVE_FLAT_TEMPORARY))
    err = flat_make_overlay(f, options->dir, SIZE_MAX);
  if (err) {
    if (t.is_new) os_remove_own_file(path, f->fd);
    flat_close(f);
    return err;
  }
  out->size = f->size;
  out->flags |= NBDSERVE_EXPORT_MULTI_CONN; /* fdatasync is for all writers */
  if (options->flags & NBDSERVE_FLAT_READONLY)
    out->flags |= NBDSERVE_EXPORT_READONLY;
  if (os_is_rotational(f->fd)) out->flags |= NBDSERVE_EXPORT_ROTATIONAL;
  out->ops = &flat_ops;
  out->ctx = f;
  return 0;
}

#endif /* !NBDSERVE_NO_FLAT */

/* ==== [11] CAS (cas_) ====================================================
 * A store: volumes and snapshots in one file, every distinct block once.  Its
 * format, and the rules (C1) to (C15) that keep it whole, stand at the end of
 * nbdserve.h.  Locks: ckpt, then lock.  Data is never read or written under
 * lock, and maps are in memory. */
#if !NBDSERVE_NO_CAS

#ifndef CAS_UNIT          /* the tests make stores with everything in small */
#define CAS_UNIT 1048576u /* bytes: superblocks, log, groups start at these */
#define CAS_FANOUT(block_size) \
  ((block_size) / 4 - 8)   /* slots in a map page \
                            */
#define CAS_ENTRIES 84     /* in a log page */
#define CAS_SEGMENT 256    /* slots that are taken in a row */
#define CAS_MIN_BLOCK 4096 /* bytes */
#endif
#define CAS_MAGIC "NBDSCAS1"
#define CAS_ANY UINT32_MAX /* cas_item.expect: the map may have any slot */
#define CAS_TAG(digest) (u_get32(digest) >> 2 | 0x40000000u) /* never 0 */
#define CAS_GOOD 0x80000000u /* read or written since, and it fitted */

/* What pages begin with: the letters of their names in the format */
enum {
  CAS_MAP = 0x4d415031, /* "MAP1" */
  CAS_CAT = 0x43415431, /* "CAT1" */
  CAS_LOG = 0x4c4f4731  /* "LOG1" */
};

/* Sizes and places of what the format describes, in bytes */
enum {
  CAS_PAGE = 4096,  /* size of a log page or superblock */
  CAS_SUM = 4064,   /* where a log page or superblock has its SHA-256 */
  CAS_HEAD = 32,    /* size of the head of any page */
  CAS_CHECK = 16,   /* where other pages have the first half of theirs */
  CAS_ENTRY = 48,   /* size of an entry of the log */
  CAS_RECORD = 256, /* size of a record of the catalog */
  CAS_NAME = 166,   /* length of the longest NAME */
  CAS_PATH = 334    /* size of the longest VOL@NAME, with the NUL */
};

/* Where the fields of a catalog record are, in bytes */
enum {
  CAS_ID = 0,          /* 4: id of the volume or snapshot */
  CAS_IS_SNAPSHOT = 4, /* 4: 1 for a snapshot */
  CAS_SIZE = 8,        /* 8: bytes */
  CAS_ROOT = 16,       /* 4: slot of the root of the map */
  CAS_DEPTH = 20,      /* 4: levels of the map */
  CAS_CREATED = 24,    /* 8: seconds since 1970 */
  CAS_ORIGIN = 36,     /* 4: id that it was made from */
  CAS_CID = 40,        /* 32: content id of a snapshot that was sealed */
  CAS_NAMED = 89       /* the name, and zeroes */
};

/* Limits that follow from the format */
enum {
  CAS_SLOTS = CAS_UNIT / 32,     /* slots in a group */
  CAS_GROUPS = CAS_UNIT / 8 - 1, /* groups in a store: < 2^32 slots in all */
  CAS_LEVELS = 4                 /* levels of a map */
};

/* How much is done at a time */
enum {
  CAS_FILL = 128,  /* digests read in one call to fill the index */
  CAS_BATCH = 256, /* blocks that go through a request's steps together */
  CAS_RUN = 64     /* pieces in one call of os_transfer */
};

/* When space is made or kept */
enum {
  CAS_DIRTY = 4096,    /* pages that changed: more bring about a checkpoint */
  CAS_WAITING = 65536, /* slots that wait for one: more bring it about, too */
  CAS_RESERVE = 4 * CAS_SEGMENT, /* free slots that data may not take */
  CAS_SLACK = 64 * CAS_SEGMENT   /* free slots to have before filling gaps */
};

/* cas_group.ref of a slot that will be free when a list of them is */
enum {
  CAS_FREED = -1
};

/* cas_item.state, bits: what is to be done, or was read, of a block */
enum {
  CAS_DATA = 1,   /* its data */
  CAS_DIGEST = 2, /* its digest */
  CAS_DUP = 4     /* it is compared with a slot that has the same digest */
};

/* What memory holds of each slot of a group; in arrays, because searches go
 * along one of these only. */
struct cas_group {
  int32_t ref[CAS_SLOTS];   /* edges and pins (C13); 0: free; or CAS_FREED */
  uint32_t tag[CAS_SLOTS];  /* CAS_TAG if it is in the index; CAS_GOOD */
  uint32_t next[CAS_SLOTS]; /* next slot of its bucket or of a list; 0: none */
  uint32_t head[CAS_SLOTS]; /* first slot of a bucket: indexed by buckets */
  uint16_t nfree[CAS_SLOTS / CAS_SEGMENT]; /* free slots in each segment */
};

/* A page of a map.  All are in memory, a fraction of what is kept of slots. */
struct cas_node {
  int32_t refs;           /* edges from pages and images (C13) */
  int level;              /* 0: its slots are those of blocks */
  int bad;                /* something below could not be read */
  uint32_t slot;          /* where it lies; 0: nowhere yet as it is now */
  uint32_t *e;            /* [fanout] slots of blocks, on level 0 */
  struct cas_node *kid[]; /* [fanout] pages below, on other levels */
};

/* A volume or snapshot.  All its exports are this one struct. */
struct cas_image {
  struct ex_batched own;            /* must come first */
  struct nbdserve_cas *s;           /* the store that it is in */
  struct cas_image *next;           /* in the catalog */
  struct cas_image *parent;         /* the volume of a snapshot, else NULL */
  struct cas_node *root;            /* its map; NULL: all holes */
  uint64_t size;                    /* bytes */
  uint64_t clients;                 /* exports and calls that use it */
  unsigned char record[CAS_RECORD]; /* of the catalog, but for root and size */
};

struct nbdserve_cas {
  /* Fixed while the store is open: no lock is needed. */
  int fd;              /* the file or block device, ours to close */
  int readonly;        /* nothing is changed */
  int verify;          /* a block is checked when it is first read */
  int hw;              /* the processor computes SHA-256 */
  int is_device;       /* it cannot grow */
  uint32_t bs;         /* bytes of a block */
  uint32_t fanout;     /* slots that a map page names */
  uint32_t log_pages;  /* pages that the log has room for */
  uint64_t data_off;   /* byte of the file where the groups begin */
  uint64_t end;        /* bytes of the file when it was opened */
  uint64_t max_blocks; /* blocks that an image may have */

  struct os_monitor ckpt;        /* one checkpoint at a time; guards these: */
  struct cas_item *pages;        /* what it writes */
  uint32_t npages;               /* how many they are */
  unsigned char super[CAS_PAGE]; /* id and log_pages in it are fixed */

  struct os_monitor lock; /* guards the rest; woken: a sync or work ended */

  int syncing;     /* a sync is under way; a second one may miss its error */
  int failed;      /* -errno: nothing is written any more (C14) */
  int log_damaged; /* the log has a page that it should not have (C9) */
  int damaged;     /* something could not be read: nothing is freed */
  int replaying;   /* what is in the log need not be logged */
  int busy;        /* a thread is in cas_work */
  int closing;     /* that thread is to end */

  struct cas_image *images; /* the catalog */
  uint32_t nimages;         /* how many they are */
  uint32_t next_id;         /* id of the next volume or snapshot */
  uint32_t catalog;         /* slot of its first page; the others by next */

  struct cas_group *groups[CAS_GROUPS]; /* the first ngroups are there */
  uint32_t ngroups;                     /* groups in memory */
  uint32_t nslots;                      /* slots in the file */
  uint32_t nfree;                       /* those with ref 0 */
  uint32_t mask;                        /* of buckets: see cas_bucket */
  uint32_t cursor;                      /* slots are taken from here on */
  uint32_t ndirty;   /* pages of maps that changed: without a slot */
  uint32_t dropped;  /* list of slots, by next: free after a sync (C5) */
  uint32_t retired;  /* the same: free after a checkpoint (C6) */
  uint32_t nwaiting; /* slots in both lists */
  uint32_t filled;   /* slots that the index was filled with */
  uint32_t to_fill;  /* slots that it is to be filled with */

  uint32_t nlog;    /* entries in the log page that is being filled */
  uint64_t seq;     /* number of that page */
  uint64_t tail;    /* number to replay from, by the superblock */
  uint64_t durable; /* pages before that number are durable (C4) */
  uint64_t nlogged; /* entries so far */
  uint64_t nsynced; /* entries that a sync has covered */
  unsigned char log[CAS_PAGE]; /* the log page that is being filled */
  unsigned char page[65536];   /* any other page */
};

#define CAS_AT(s, x, field) \
  ((s)->groups[(x) / CAS_SLOTS]->field[(x) % CAS_SLOTS])
#define CAS_NFREE(s, x) /* of its segment */ \
  ((s)->groups[(x) / CAS_SLOTS]->nfree[(x) % CAS_SLOTS / CAS_SEGMENT])
#define CAS_NEEDED(s) ((s)->ndirty + (s)->nimages + 2) /* by a checkpoint */

/* ---- Slots -------------------------------------------------------------- */

/* How many blocks that many bytes take; the last one may be a part. */
static uint64_t cas_blocks(const struct nbdserve_cas *s, uint64_t size) {
  return size / s->bs + (size % s->bs != 0);
}

/* Where the data (CAS_DATA) or the digest of a slot lies in the file. */
static uint64_t cas_off(const struct nbdserve_cas *s, uint32_t x, int what) {
  uint64_t group = CAS_UNIT + (uint64_t)CAS_SLOTS * s->bs, in = x % CAS_SLOTS;
  in = what == CAS_DATA ? CAS_UNIT + in * s->bs : in * 32;
  return s->data_off + x / CAS_SLOTS * group + in;
}

/* The bucket of a tag.  There are as many as slots in all groups: their number
 * is above mask and at most twice that, so a new group splits just some. */
static uint32_t *cas_bucket(struct nbdserve_cas *s, uint32_t tag) {
  uint32_t b = tag & ~CAS_GOOD & (2 * s->mask + 1);
  if (b >= s->ngroups * CAS_SLOTS) b &= s->mask;
  return &CAS_AT(s, b, head);
}

/* Enters a slot into the index of digests, under its tag. */
static void cas_index(struct nbdserve_cas *s, uint32_t x, uint32_t tag) {
  uint32_t *b = cas_bucket(s, tag);
  assert(x && tag);
  CAS_AT(s, x, tag) |= tag;
  CAS_AT(s, x, next) = *b;
  *b = x;
}

/* Takes a slot out of the index, if it is there, and clears its tag. */
static void cas_unindex(struct nbdserve_cas *s, uint32_t x) {
  uint32_t *tag = &CAS_AT(s, x, tag), *p = cas_bucket(s, *tag);
  while (*tag && *p && *p != x)
    p = &CAS_AT(s, *p, next);
  if (*p == x) *p = CAS_AT(s, x, next); /* else it is a page, or not there */
  *tag = 0;
}

/* Counts segments in until there is slot x; a new group splits buckets. */
static int cas_extend(struct nbdserve_cas *s, uint32_t x) {
  for (; s->nslots <= x; s->nslots += CAS_SEGMENT) {
    if (s->nslots == s->ngroups * CAS_SLOTS) {
      if (s->ngroups == CAS_GROUPS) return -ENOSPC;
      s->groups[s->ngroups] = u_zalloc(sizeof(struct cas_group));
      if (!s->groups[s->ngroups]) return -ENOMEM;
      s->ngroups++;
      uint32_t b = s->nslots ? s->nslots : 1;
      for (; b < s->ngroups * CAS_SLOTS; b++) {
        if (b > 2 * s->mask + 1) s->mask = 2 * s->mask + 1;
        uint32_t *p = &CAS_AT(s, b - s->mask - 1, head), y = *p, next;
        for (*p = 0; y; y = next) {
          next = CAS_AT(s, y, next);
          cas_index(s, y, CAS_AT(s, y, tag));
        }
      }
    }
    CAS_NFREE(s, s->nslots) = s->nslots ? CAS_SEGMENT : CAS_SEGMENT - 1;
    s->nfree += CAS_NFREE(s, s->nslots);
    CAS_AT(s, 0, ref) = 1; /* that number means zeroes */
  }
  return 0;
}

/* Makes the file longer by one segment of slots. */
static int cas_grow(struct nbdserve_cas *s) {
  uint32_t x = s->nslots;
  uint64_t end = cas_off(s, x, CAS_DATA) + (uint64_t)CAS_SEGMENT * s->bs;
  uint64_t off = x ? cas_off(s, x, x % CAS_SLOTS ? CAS_DATA : CAS_DIGEST) : 0;
  if (s->is_device ? end > s->end : end > INT64_MAX) return -ENOSPC;
  int err = s->is_device ? 0 : os_fallocate(s->fd, OS_ALLOCATE, off, end - off);
  return err && err != -EOPNOTSUPP ? err : cas_extend(s, x);
}

/* Sees to it that there are free slots for a checkpoint and so many more. */
static int cas_want(struct nbdserve_cas *s, uint32_t more) {
  int err = s->failed;
  while (!err && s->nfree < CAS_NEEDED(s) + more)
    err = cas_grow(s);
  return err;
}

/* One more edge to a slot, or pin on it.  A free one is taken by that. */
static void cas_hold(struct nbdserve_cas *s, uint32_t x) {
  int32_t *ref = &CAS_AT(s, x, ref);
  if (!x) return;
  if (!*ref) s->nfree--;
  if (!*ref) CAS_NFREE(s, x)--;
  *ref = *ref == CAS_FREED ? 1 : *ref + 1;
}

/* One less.  After the last the slot goes to a list that will be freed. */
static void cas_drop(struct nbdserve_cas *s, uint32_t x, uint32_t *list) {
  int32_t *ref = &CAS_AT(s, x, ref);
  if (!x || (s->damaged && *ref == 1)) return;
  assert(*ref > 0);
  if (--*ref > 0) return;
  cas_unindex(s, x);
  *ref = CAS_FREED;
  if (s->replaying) return; /* it may come back: see nbdserve_cas_open */
  CAS_AT(s, x, next) = *list;
  *list = x;
  s->nwaiting++;
}

/* Frees a list of slots that nothing durable names any more. */
static void cas_free(struct nbdserve_cas *s, uint32_t x) {
  for (; x; x = CAS_AT(s, x, next)) {
    assert(CAS_AT(s, x, ref) == CAS_FREED);
    CAS_AT(s, x, ref) = 0;
    CAS_NFREE(s, x)++;
    s->nfree++;
    s->nwaiting--;
  }
}

/* The segment to take slots from next, from x on: one with room enough, or a
 * new one at the file's end while that has little to spare. */
static uint32_t cas_segment(struct nbdserve_cas *s, uint32_t x) {
  int spare = s->nfree > (s->nslots - s->nfree) / 10 + CAS_SLACK;
  uint32_t want = spare ? CAS_SEGMENT / 4 : CAS_SEGMENT * 3 / 4;
  for (uint32_t i = 1;; i++, x += CAS_SEGMENT) {
    if (x >= s->nslots) x = 0;
    if (CAS_NFREE(s, x) >= want) return x;
    if (i % 4096 && i < s->nslots / CAS_SEGMENT) continue;
    if (!spare && cas_grow(s) == 0) return s->nslots - CAS_SEGMENT;
    want = want > 4 ? want / 4 : 1; /* there is one: nfree > 0 */
    i = 0;
  }
}

/* Takes a free slot; the caller knows that there is one. */
static uint32_t cas_alloc(struct nbdserve_cas *s) {
  assert(s->nfree > 0);
  for (;; s->cursor++) {
    if (s->cursor % CAS_SEGMENT == 0) s->cursor = cas_segment(s, s->cursor);
    if (!CAS_AT(s, s->cursor, ref)) break;
  }
  cas_hold(s, s->cursor);
  return s->cursor++;
}

/* ---- Data, pages, log ---------------------------------------------------- */

/* A block, or a page, on its way between a request and the file */
struct cas_item {
  uint64_t lba;             /* number of the block in its image */
  unsigned char *data;      /* [block_size] */
  struct nbdserve_req *req; /* the request that it is a part of */
  uint32_t slot;            /* where it lies, or 0 */
  uint32_t expect;          /* slot that the map must have, or CAS_ANY */
  int state;                /* bits: CAS_DATA, CAS_DIGEST, CAS_DUP */
  int err;                  /* 0 or -errno */
  unsigned char sum[32];    /* SHA-256 of data */
  unsigned char digest[32]; /* the slot's digest, if it was read */
};

/* Reads or writes at an offset in the file. */
static int cas_io(struct nbdserve_cas *s, int writing, void *buf, size_t len,
                  uint64_t off) {
  struct iovec v = {buf, len};
  return os_transfer(s->fd, writing, &v, 1, off);
}

/* Reads or writes what of the items, in few calls.  0 or the last error. */
static int cas_transfer(struct nbdserve_cas *s, struct cas_item *it, size_t n,
                        int what, int writing) {
  struct iovec v[CAS_RUN];
  int err = 0;
  for (size_t k; n > 0; it += k, n -= k) {
    for (k = 0; k < n && k < CAS_RUN && it[k].state & what; k++) {
      if (k && (it[k].slot % CAS_SLOTS == 0 || it[k].slot - k != it->slot))
        break;
      v[k] = (struct iovec){writing ? it[k].sum : it[k].digest, 32};
      if (what == CAS_DATA) v[k] = (struct iovec){it[k].data, s->bs};
    }
    int e =
        k ? os_transfer(s->fd, writing, v, (int)k, cas_off(s, it->slot, what))
          : 0;
    if (e && k == 1) err = it->err = e;
    for (size_t i = 0; e && k > 1 && i < k; i++) /* what fails alone failed */
      if (cas_transfer(s, it + i, 1, what, writing)) err = it[i].err;
    if (!k) k = 1;
  }
  return err;
}

/* Writes what is to be written; first the digests: who finds data finds both */
static int cas_store(struct nbdserve_cas *s, struct cas_item *it, size_t n) {
  int err = cas_transfer(s, it, n, CAS_DIGEST, 1);
  return err ? err : cas_transfer(s, it, n, CAS_DATA, 1);
}

/* Computes the digests of the items that have data and digest to do, two at a
 * time. */
static void cas_hash(struct nbdserve_cas *s, struct cas_item *it, size_t n) {
  struct cas_item *first = NULL;
  for (; n > 0; it++, n--) {
    if (~it->state & (CAS_DATA | CAS_DIGEST) || it->err) continue;
    if (first)
      sha_256(s->hw, first->data, it->data, s->bs, first->sum, it->sum);
    first = first ? NULL : it;
  }
  if (first) sha_256(s->hw, first->data, NULL, s->bs, first->sum, NULL);
}

/* Puts its sum into a page, superblock or log page, at.  Was it there? */
static int cas_stamp(const struct nbdserve_cas *s, unsigned char *p, int at) {
  unsigned char was[32], sum[32];
  size_t len = at == CAS_SUM ? CAS_SUM : s->bs, n = at == CAS_SUM ? 32 : 16;
  memcpy(was, p + at, n);
  memset(p + at, 0, n);
  sha_256(s->hw, p, NULL, len, sum, NULL);
  memcpy(p + at, sum, n);
  return memcmp(was, sum, n) == 0;
}

/* Reads a page.  -EIO: it is not what it should be. */
static int cas_get_page(struct nbdserve_cas *s, uint32_t x, uint32_t magic,
                        int level, uint32_t index, unsigned char *p) {
  if (x >= s->nslots) return -EIO;
  int err = cas_io(s, 0, p, s->bs, cas_off(s, x, CAS_DATA));
  if (err) return err;
  return cas_stamp(s, p, CAS_CHECK) && u_get32(p) == magic &&
                 u_get32(p + 4) == (uint32_t)level && u_get32(p + 8) == index
             ? 0
             : -EIO;
}

/* Nothing is written any more (C14). */
static int cas_fail(struct nbdserve_cas *s, int err) {
  if (err) s->failed = -EIO;
  if (err) os_wake_all(&s->lock);
  return err;
}

/* Writes the log page that is being filled, and begins the next one (C3). */
static int cas_log_write(struct nbdserve_cas *s) {
  uint64_t off = 2 * CAS_UNIT + s->seq % s->log_pages * CAS_PAGE;
  if (!s->nlog || s->failed) return s->failed;
  assert(s->seq - s->tail < s->log_pages);
  u_put32(s->log, CAS_LOG);
  u_put16(s->log + 4, s->nlog);
  u_put64(s->log + 8, s->seq++); /* (C3) */
  u_put64(s->log + 16, s->durable);
  memcpy(s->log + 24, s->super + 16, 8);
  cas_stamp(s, s->log, CAS_SUM);
  s->nlog = 0;
  return cas_fail(s, cas_io(s, 1, s->log, CAS_PAGE, off));
}

/* Logs that a block of an image is now in a slot, or count of them zeroes. */
static void cas_log(struct nbdserve_cas *s, const struct cas_image *im,
                    const struct cas_item *it, uint64_t count) {
  unsigned char *p = s->log + 32 + CAS_ENTRY * s->nlog;
  if (s->replaying) return;
  memset(p, 0, CAS_ENTRY);
  memcpy(p, im->record + CAS_ID, 4);
  u_put32(p + 4, it->slot);
  u_put64(p + 8, it->lba);
  if (!it->slot) u_put64(p + 16, count);
  if (it->slot) memcpy(p + 16, it->sum, 32);
  s->nlogged++;
  if (++s->nlog == CAS_ENTRIES) cas_log_write(s); /* s->failed tells */
}

/* Makes all that was written so far durable; one caller syncs for those that
 * wait meanwhile, unless it is told to. */
static int cas_sync(struct nbdserve_cas *s, int always) {
  os_lock(&s->lock);
  uint64_t mine = s->nlogged;
  while (s->syncing)
    os_wait(&s->lock);
  int err = s->failed;
  if (!err && (always || s->nsynced < mine)) {
    s->syncing = 1;
    mine = s->nlogged;
    err = cas_log_write(s);
    uint64_t seq = s->seq;
    uint32_t dropped = s->dropped;
    s->dropped = 0;
    os_unlock(&s->lock);
    if (!err) err = os_datasync(s->fd);
    os_lock(&s->lock);
    cas_fail(s, err);
    if (!err) s->durable = seq; /* (C4) */
    if (!err) s->nsynced = mine;
    if (!err) cas_free(s, dropped); /* (C5) */
    s->syncing = 0;
    os_wake_all(&s->lock);
  }
  os_unlock(&s->lock);
  return err;
}

/* ---- Maps and the catalog ------------------------------------------------ */

/* Takes an edge off a page, after the last off all below, and yields lock. */
static void cas_unref(struct nbdserve_cas *s, struct cas_node *b) {
  if (!b || --b->refs > 0) return;
  for (uint32_t c = 0; b->level && c < s->fanout; c++)
    cas_unref(s, b->kid[c]);
  for (uint32_t c = 0; !b->level && c < s->fanout; c++)
    cas_drop(s, b->e[c], &s->retired);
  if (!b->slot) s->ndirty--;
  cas_drop(s, b->slot, &s->retired);
  NBDSERVE_FREE(b);
  os_unlock(&s->lock);
  os_lock(&s->lock);
}

/* Makes the page at *p, which is to change or new, the image's own (C13). */
static int cas_own(struct nbdserve_cas *s, struct cas_node **p, int level) {
  struct cas_node *b = *p;
  if (b && b->refs == 1) {
    if (b->slot) s->ndirty++;
    cas_drop(s, b->slot, &s->retired);
    b->slot = 0;
    return 0;
  }
  struct cas_node *n =
      u_zalloc(sizeof *n + s->fanout * (level ? sizeof *n->kid : sizeof *n->e));
  if (!n) return -ENOMEM;
  n->refs = 1;
  n->level = level;
  n->e = (uint32_t *)(void *)n->kid;
  for (uint32_t c = 0; b && c < s->fanout; c++)
    if (!level)
      cas_hold(s, n->e[c] = b->e[c]);
    else if ((n->kid[c] = b->kid[c]))
      n->kid[c]->refs++;
  if (b) b->refs--;
  s->ndirty++;
  *p = n;
  return 0;
}

/* Gets the slot of block lba to *x, and *span blocks that are as that one if
 * span is not NULL; set: puts *x there, and the caller's hold passes to it. */
static int cas_map(struct nbdserve_cas *s, struct cas_image *im, uint64_t lba,
                   int set, uint32_t *x, uint64_t *span) {
  struct cas_node **p = &im->root, *b;
  uint64_t size = s->max_blocks, i = lba % s->fanout; /* size: below *p */
  int level, err;
  for (level = CAS_LEVELS - 1;; level--) {
    if (*p && (*p)->bad) return -EIO;
    if (set && (err = cas_own(s, p, level))) return err;
    b = *p;
    if (!b || !level) break;
    size /= s->fanout;
    p = &b->kid[lba / size % s->fanout];
  }
  if (set) cas_drop(s, b->e[i], &s->dropped);
  if (set) b->e[i] = *x;
  *x = b ? b->e[i] : 0;
  if (!span) return 0;
  *span = b ? 1 : size - lba % size;
  while (b && !*x && i + *span < s->fanout && !b->e[i + *span])
    ++*span;
  return 0;
}

/* The full name, VOL or VOL@SNAP, in out. */
static const char *cas_name(const struct cas_image *im, char out[CAS_PATH]) {
  const char *up = im->parent ? (char *)im->parent->record + CAS_NAMED : "";
  snprintf(out, CAS_PATH, "%s%s%s", up, im->parent ? "@" : "",
           (const char *)im->record + CAS_NAMED);
  return out;
}

/* Its "sha256-HEX", or "". */
static char *cas_spell(const struct cas_image *im, char id[72]) {
  const unsigned char *h = im->record + CAS_CID;
  strcpy(id, u_is_zero(h, 32) ? "" : "sha256-");
  for (int i = 0; *id && i < 32; i += 8)
    snprintf(id + 7 + 2 * i, 17, "%016" PRIx64, u_get64(h + i));
  return id;
}

/* The volume or snapshot of that name, of n bytes, or content id. */
static struct cas_image *cas_find(struct nbdserve_cas *s, const char *name,
                                  size_t n) {
  char full[CAS_PATH], id[72];
  struct cas_image *im = s->images;
  for (; im; im = im->next)
    if ((strncmp(cas_name(im, full), name, n) == 0 && !full[n]) ||
        (n == 71 && strncmp(cas_spell(im, id), name, n) == 0))
      break;
  return im;
}

/* May a volume or snapshot have that name? */
static int cas_is_name(const char *p) {
  size_t n = strncmp(p, "sha256-", 7) ? strlen(p) : 0;
  while (*p && u_utf8_len(p) && !strchr("/@\"\\", *p))
    p += u_utf8_len(p);
  return n > 0 && n <= CAS_NAME && !*p;
}

/* Gives a volume or snapshot its name; -EEXIST: another one has it. */
static int cas_give_name(struct nbdserve_cas *s, struct cas_image *im,
                         const char *name) {
  const char *at = strchr(name, '@'), *part = at ? at + 1 : name;
  if (!cas_is_name(part) || strncmp(name, "sha256-", 7) == 0 ||
      !at != !im->parent ||
      im->parent != (at ? cas_find(s, name, (size_t)(at - name)) : NULL))
    return -EINVAL;
  if (cas_find(s, name, strlen(name))) return -EEXIST;
  memset(im->record + CAS_NAMED, 0, CAS_RECORD - CAS_NAMED);
  memcpy(im->record + CAS_NAMED, part, strlen(part));
  return 0;
}

/* The arguments of nbdserve_cas_change */
struct cas_op {
  int verb;         /* NBDSERVE_CAS_CREATE..., maybe with _DRY_RUN */
  const char *name; /* what is changed or made */
  const char *to;   /* the new name, for verbs that have one, else NULL */
  uint64_t size;    /* bytes, for verbs that have a size, else 0 */
};

/* Applies a change to the catalog.  *gone: a map that nothing leads to then. */
static int cas_apply(struct nbdserve_cas *s, const struct cas_op *op,
                     struct cas_node **gone) {
  int verb = op->verb & ~NBDSERVE_CAS_DRY_RUN, dry_run = verb != op->verb;
  int is_new = verb < NBDSERVE_CAS_RENAME, err = 0;
  size_t n = strcspn(op->name, verb == NBDSERVE_CAS_SNAPSHOT ? "@" : "");
  struct cas_image *im = cas_find(s, op->name, n), *to, *kid, **p = &s->images;
  if (verb < NBDSERVE_CAS_CREATE || verb > NBDSERVE_CAS_RM ||
      cas_blocks(s, op->size) > s->max_blocks || op->size > INT64_MAX ||
      (dry_run && verb < NBDSERVE_CAS_ROLLBACK))
    return -EINVAL;
  if (!im && verb != NBDSERVE_CAS_CREATE) return -ENOENT;
  if (is_new)
    to = u_zalloc(sizeof *to);
  else if (verb == NBDSERVE_CAS_ROLLBACK)
    to = im->parent;
  else
    to = im;
  if (!to || (verb == NBDSERVE_CAS_RESIZE && im->parent))
    return is_new ? -ENOMEM : -EINVAL;
  if (verb >= NBDSERVE_CAS_ROLLBACK &&
      to->clients > (op->verb == NBDSERVE_CAS_RESIZE))
    return -EBUSY;
  for (kid = s->images; kid && verb == NBDSERVE_CAS_RM; kid = kid->next)
    if (kid->parent == im) return -ENOTEMPTY;
  if (dry_run) return 0;
  if (verb == NBDSERVE_CAS_SNAPSHOT) to->parent = im;
  if (verb <= NBDSERVE_CAS_RENAME)
    err = cas_give_name(s, to, verb < NBDSERVE_CAS_CLONE ? op->name : op->to);
  if (err && is_new) NBDSERVE_FREE(to);
  if (err || verb == NBDSERVE_CAS_RENAME) return err;
  while (*p && (is_new || *p != im))
    p = &(*p)->next;
  if (is_new) {
    u_put32(to->record + CAS_ID, s->next_id++);
    u_put32(to->record + CAS_IS_SNAPSHOT, to->parent != NULL);
    u_put32(to->record + CAS_DEPTH, CAS_LEVELS);
    u_put64(to->record + CAS_CREATED, (uint64_t)time(NULL));
    if (im) memcpy(to->record + CAS_ORIGIN, im->record + CAS_ID, 4);
    to->s = s;
    *p = to;
    s->nimages++;
  }
  if (verb == NBDSERVE_CAS_RM) {
    *p = im->next;
    *gone = im->root;
    s->nimages--;
    NBDSERVE_FREE(im);
  } else if (verb == NBDSERVE_CAS_CREATE || verb == NBDSERVE_CAS_RESIZE) {
    to->size = op->size;
  } else { /* it gets what im has */
    *gone = to->root;
    to->size = im->size;
    to->root = im->root;
    if (to->root) to->root->refs++;
  }
  return 0;
}

/* ---- Checkpoints --------------------------------------------------------- */

/* Takes a slot for the page that is next in s->pages, and writes its head. */
static uint32_t cas_take_page(struct nbdserve_cas *s, uint32_t magic, int level,
                              uint32_t index) {
  struct cas_item *it = s->pages + s->npages++;
  u_put32(it->data, magic);
  u_put32(it->data + 4, (uint32_t)level);
  u_put32(it->data + 8, index);
  it->state = CAS_DATA | CAS_DIGEST;
  it->slot = cas_alloc(s);
  CAS_AT(s, it->slot, tag) = 1; /* in no bucket: cas_work skips it */
  return it->slot;
}

/* Takes slots for pages from *at down that have none; empty ones go. */
static void cas_take_map(struct nbdserve_cas *s, struct cas_node **at,
                         int level, uint32_t index) {
  struct cas_node *b = *at;
  if (!b || b->slot) return;
  for (uint32_t i = 0; level && i < s->fanout; i++)
    cas_take_map(s, &b->kid[i], level - 1, index * s->fanout + i);
  unsigned char *p = s->pages[s->npages].data;
  for (uint32_t i = 0; i < s->fanout; i++) {
    uint32_t slot = 0;
    if (!level)
      slot = b->e[i];
    else if (b->kid[i])
      slot = b->kid[i]->slot;
    u_put32(p + CAS_HEAD + 4 * i, slot);
  }
  int empty = b->refs == 1 && u_is_zero(p, s->bs);
  s->ndirty--;
  if (!empty) b->slot = cas_take_page(s, CAS_MAP, level, index);
  if (empty) NBDSERVE_FREE(b);
  if (empty) *at = NULL;
}

/* Takes new slots for the whole catalog; the old ones are retired. */
static void cas_take_catalog(struct nbdserve_cas *s) {
  struct cas_image *im = s->images;
  uint32_t x, next;
  for (x = s->catalog; x; x = next) {
    next = CAS_AT(s, x, next);
    cas_drop(s, x, &s->retired);
  }
  for (s->catalog = 0; im; s->catalog = x) {
    unsigned char *p = s->pages[s->npages].data;
    for (uint32_t k = CAS_HEAD; k + CAS_RECORD <= s->bs && im; im = im->next) {
      u_put64(im->record + CAS_SIZE, im->size);
      u_put32(im->record + CAS_ROOT, im->root ? im->root->slot : 0);
      memcpy(p + k, im->record, CAS_RECORD);
      k += CAS_RECORD;
    }
    u_put32(p + 12, s->catalog);
    x = cas_take_page(s, CAS_CAT, 0, 0);
    CAS_AT(s, x, next) = s->catalog;
  }
}

/* Writes all changed pages and the catalog, with a change to it if op is not
 * NULL, so that the log up to now is not needed any more.  The error of op,
 * -ENOSPC or -ENOMEM: nothing has changed; others last. */
static int cas_checkpoint(struct nbdserve_cas *s, const struct cas_op *op) {
  struct cas_node *gone = NULL;
  os_lock(&s->ckpt);
  os_lock(&s->lock);
  if (cas_want(s, 0)) {
    os_unlock(&s->lock);
    cas_sync(s, 1); /* may give some back */
    os_lock(&s->lock);
  }
  uint32_t max = CAS_NEEDED(s);
  size_t page = sizeof *s->pages + s->bs;
  s->pages = max <= SIZE_MAX / page ? u_zalloc(max * page) : NULL;
  int err = s->pages ? cas_want(s, 0) : -ENOMEM;
  if (!err) err = cas_log_write(s);
  if (!err && op) err = cas_apply(s, op, &gone);
  if (err) goto out;
  for (uint32_t i = 0; i < max; i++)
    s->pages[i].data = (unsigned char *)(s->pages + max) + (size_t)i * s->bs;
  s->npages = 0;
  for (struct cas_image *im = s->images; im; im = im->next)
    cas_take_map(s, &im->root, CAS_LEVELS - 1, 0);
  cas_take_catalog(s);
  assert(s->npages <= max);
  uint64_t seq = s->seq;
  uint32_t retired = s->retired;
  s->retired = 0;
  u_put64(s->super + 32, u_get64(s->super + 32) + 1);
  u_put64(s->super + 40, seq);
  u_put32(s->super + 52, s->nslots);
  u_put32(s->super + 56, s->catalog);
  u_put32(s->super + 60, s->next_id);
  cas_stamp(s, s->super, CAS_SUM);
  os_unlock(&s->lock);
  for (uint32_t i = 0; i < s->npages; i++)
    cas_stamp(s, s->pages[i].data, CAS_CHECK);
  err = cas_store(s, s->pages, s->npages); /* their digests: zeroes (C11) */
  if (!err) err = cas_sync(s, 1);          /* (C7) */
  if (!err) err = cas_io(s, 1, s->super, CAS_PAGE, 0);
  if (!err) err = cas_sync(s, 1);
  if (!err) err = cas_io(s, 1, s->super, CAS_PAGE, CAS_UNIT);
  os_lock(&s->lock);
  cas_fail(s, err);
  if (!err) s->tail = seq;
  if (!err) cas_free(s, retired); /* (C6) */
  cas_unref(s, gone);
out:
  os_unlock(&s->lock);
  NBDSERVE_FREE(s->pages);
  os_unlock(&s->ckpt);
  return err;
}

/* What is to be done beside requests?  1: fill the index, 2: a checkpoint. */
static int cas_due(const struct nbdserve_cas *s) {
  if (s->failed || s->readonly || s->replaying || s->closing) return 0;
  if (s->seq - s->tail > s->log_pages / 2 || s->ndirty > CAS_DIRTY ||
      s->nwaiting > CAS_WAITING ||
      (s->nwaiting > 0 && s->nfree < CAS_NEEDED(s) + CAS_SEGMENT))
    return 2;
  return s->filled < s->to_fill;
}

/* The thread beside requests: fills the index, writes checkpoints, and ends
 * when nothing is due. */
static void *cas_work(void *arg) {
  unsigned char d[CAS_FILL][32];
  struct nbdserve_cas *s = arg;
  os_lock(&s->lock);
  for (int err = 0, due; !err && (due = cas_due(s));) {
    uint32_t x = s->filled;
    if (due == 1) s->filled += CAS_FILL;
    if (due == 1 && !cas_io(s, 0, d, sizeof d, cas_off(s, x, CAS_DIGEST)))
      for (uint32_t i = x ? 0 : 1; i < CAS_FILL; i++)
        if (CAS_AT(s, x + i, ref) > 0 && !(CAS_AT(s, x + i, tag) & ~CAS_GOOD) &&
            !u_is_zero(d[i], 32)) /* (C11) */
          cas_index(s, x + i, CAS_TAG(d[i]));
    os_unlock(&s->lock); /* others may want it */
    if (due == 2) err = cas_checkpoint(s, NULL);
    os_lock(&s->lock);
  }
  s->busy = 0;
  os_wake_all(&s->lock);
  os_unlock(&s->lock);
  return NULL;
}

/* Starts cas_work if something is due and it does not run. */
static void cas_kick(struct nbdserve_cas *s) {
  os_lock(&s->lock);
  int start = !s->busy && cas_due(s);
  if (start) s->busy = 1;
  os_unlock(&s->lock);
  if (start && os_thread(cas_work, s)) cas_work(s);
}

/* ---- Requests ------------------------------------------------------------ */

/* Waits, without lock, for room for an entry in the log, whose last quarter is
 * for pages that are not full, and for the pages that it may dirty. */
static int cas_room(struct nbdserve_cas *s) {
  int err = 0, tried = 0;
  while (!s->failed && !s->replaying) {
    int tight = cas_want(s, CAS_SEGMENT) != 0;
    if (!tight && s->seq - s->tail < s->log_pages / 4 * 3) return 0;
    if (err || (tight && tried)) return err ? err : -ENOSPC;
    if (s->busy) {
      os_wait(&s->lock);
    } else {
      os_unlock(&s->lock);
      err = cas_checkpoint(s, NULL);
      os_lock(&s->lock);
      tried = 1;
    }
  }
  return s->failed;
}

/* Takes a slot for a block: one that may have the same data, or a new one. */
static int cas_choose(struct nbdserve_cas *s, struct cas_item *it, int hint) {
  uint32_t tag = CAS_TAG(it->sum), x = hint ? *cas_bucket(s, tag) : 0;
  while (x && ((CAS_AT(s, x, tag) & ~CAS_GOOD) != tag ||
               CAS_AT(s, x, ref) > INT32_MAX / 2))
    x = CAS_AT(s, x, next);
  int err = x ? 0 : cas_want(s, CAS_RESERVE + 1);
  it->state = x ? CAS_DUP : CAS_DATA | CAS_DIGEST;
  if (x) cas_hold(s, x);
  if (!x && !err) cas_index(s, x = cas_alloc(s), tag);
  it->slot = x;
  return err;
}

/* Stores blocks; no slots are set.  0, or an error, which is that of all that
 * fail; -EAGAIN: the map does not have what was expected. */
static int cas_put(struct nbdserve_cas *s, struct cas_image *im,
                   struct cas_item *it, size_t n) {
  unsigned char *same = NULL;
  uint32_t was = 0;
  for (size_t i = 0; i < n; i++)
    it[i].state = u_is_zero(it[i].data, s->bs) ? 0 : CAS_DATA | CAS_DIGEST;
  cas_hash(s, it, n);
  os_lock(&s->lock);
  int err = s->failed;
  for (size_t i = 0; i < n && !err; i++)
    if (it[i].state) err = cas_choose(s, it + i, 1);
  os_unlock(&s->lock);
  if (!err) err = cas_store(s, it, n);
  for (size_t i = 0; i < n && !err; i++) {
    if (it[i].state != CAS_DUP) continue; /* maybe of a block of this call */
    uint64_t off = cas_off(s, it[i].slot, CAS_DATA);
    if (!same && !(same = NBDSERVE_MALLOC(s->bs))) err = -ENOMEM;
    if (err || (!cas_io(s, 0, same, s->bs, off) &&
                memcmp(same, it[i].data, s->bs) == 0))
      continue;
    os_lock(&s->lock); /* it is not: take another one (C12) */
    cas_drop(s, it[i].slot, &s->dropped);
    err = cas_choose(s, it + i, 0);
    os_unlock(&s->lock);
    if (!err) err = cas_store(s, it + i, 1);
  }
  NBDSERVE_FREE(same);
  os_lock(&s->lock);
  for (size_t i = 0; i < n; i++) { /* into the map and the log (C2) */
    if (!err) err = cas_room(s);
    if (!err) err = cas_map(s, im, it[i].lba, 0, &was, NULL);
    if (!err && it[i].expect != CAS_ANY && it[i].expect != was) err = -EAGAIN;
    if (!err && it[i].state & CAS_DATA) CAS_AT(s, it[i].slot, tag) |= CAS_GOOD;
    if (!err && it[i].slot != was &&
        !(err = cas_map(s, im, it[i].lba, 1, &it[i].slot, NULL))) {
      cas_log(s, im, it + i, 1);
      it[i].slot = 0; /* it is the map's */
      err = s->failed;
    }
    cas_drop(s, it[i].slot, &s->dropped);
    it[i].err = err;
  }
  os_unlock(&s->lock);
  return err;
}

/* Pins the slots of blocks and reads what is wanted, CAS_DATA, CAS_DIGEST or 0,
 * of them, and both of those that are not known to be good, which are checked:
 * for data only if s->verify.  0 or the last of their errors. */
static int cas_read(struct nbdserve_cas *s, struct cas_image *im,
                    struct cas_item *it, size_t n, int want) {
  int err = 0, trust = want == CAS_DATA && !s->verify;
  os_lock(&s->lock);
  for (size_t i = 0; i < n; i++) {
    it[i].slot = 0;
    it[i].err = cas_map(s, im, it[i].lba, 0, &it[i].slot, NULL);
    int good = CAS_AT(s, it[i].slot, tag) & CAS_GOOD && !s->failed;
    if (!it[i].slot)
      it[i].state = 0;
    else if (good || trust)
      it[i].state = want;
    else
      it[i].state = CAS_DATA | CAS_DIGEST;
    cas_hold(s, it[i].slot);
  }
  os_unlock(&s->lock);
  cas_transfer(s, it, n, CAS_DATA, 0);
  cas_transfer(s, it, n, CAS_DIGEST, 0);
  cas_hash(s, it, n);
  for (size_t i = 0; i < n; i++) {
    if (!it[i].slot && want == CAS_DATA) memset(it[i].data, 0, s->bs);
    if (it[i].state == (CAS_DATA | CAS_DIGEST) && !it[i].err &&
        memcmp(it[i].digest, it[i].sum, 32) != 0)
      it[i].err = -EIO;
    if (it[i].err) err = it[i].err;
  }
  return err;
}

/* Takes the pins away again.  What is bad is not used again: writing heals. */
static void cas_unpin(struct nbdserve_cas *s, struct cas_item *it, size_t n) {
  os_lock(&s->lock);
  for (; n-- > 0; it++) {
    if (it->slot && it->err) cas_unindex(s, it->slot);
    if (it->state & CAS_DIGEST && !it->err)
      CAS_AT(s, it->slot, tag) |= CAS_GOOD;
    cas_drop(s, it->slot, &s->dropped);
  }
  os_unlock(&s->lock);
}

/* READs, WRITEs or WRITE_ZEROES a part of one block. */
static int cas_part(struct nbdserve_cas *s, struct cas_image *im, int what,
                    unsigned char *buf, uint64_t off, uint64_t len) {
  struct cas_item it = {.lba = off / s->bs, .data = NBDSERVE_MALLOC(s->bs)};
  if (!it.data) return -ENOMEM;
  unsigned char *part = it.data + off % s->bs;
  int err;
  do {
    err = cas_read(s, im, &it, 1, CAS_DATA);
    if (!err && what == NBD_CMD_READ) memcpy(buf, part, (size_t)len);
    if (!err && what != NBD_CMD_READ) {
      if (what == NBD_CMD_WRITE) memcpy(part, buf, (size_t)len);
      if (what != NBD_CMD_WRITE) memset(part, 0, (size_t)len);
      struct cas_item w = {.lba = it.lba, .data = it.data, .expect = it.slot};
      err = cas_put(s, im, &w, 1); /* that is pinned: no other can become it */
    }
    cas_unpin(s, &it, 1);
  } while (err == -EAGAIN);
  NBDSERVE_FREE(it.data);
  return err;
}

/* Is block lba of two images in the same slot?  *span: for how many blocks that
 * is so; pages that they share are not looked at.  Where only one ends inside
 * the block, it is not the same. */
static int cas_same(struct nbdserve_cas *s, struct cas_image **im, uint64_t lba,
                    uint64_t *span, int *same) {
  struct cas_node *b[2];
  uint32_t slot[2] = {0, 0};
  uint64_t below = s->max_blocks; /* blocks below b */
  int err = 0, odd = 0;
  *span = below;
  os_lock(&s->lock);
  for (int i = 0; i < 2; i++) {
    uint64_t whole = im[i]->size / s->bs;
    b[i] = lba < cas_blocks(s, im[i]->size) ? im[i]->root : NULL;
    if (lba < whole) *span = u_min(*span, whole - lba);
    odd |= lba == whole && b[i] && im[0]->size != im[1]->size;
  }
  for (int level = CAS_LEVELS; level-- > 0 && (odd || b[0] != b[1]);) {
    below /= s->fanout;
    for (int i = 0; i < 2; i++) {
      uint64_t c = lba / below % s->fanout;
      if (b[i] && b[i]->bad) err = -EIO;
      if (b[i] && !level) slot[i] = b[i]->e[c];
      b[i] = b[i] && level ? b[i]->kid[c] : NULL;
    }
  }
  os_unlock(&s->lock);
  *span = u_min(*span, below - lba % below);
  *same = slot[0] == slot[1] && !(odd && slot[0]);
  return err;
}

/* READs and WRITEs: whole blocks together, parts of blocks one by one. */
static void cas_batch(void *ctx, struct nbdserve_req *r, size_t n) {
  struct cas_image *im = ctx;
  struct nbdserve_cas *s = im->s;
  struct cas_item it[CAS_BATCH];
  uint64_t bs = s->bs, len;
  size_t k = 0;
  for (; n > 0; r++, n--) {
    int writing = r->type == NBD_CMD_WRITE, err = r->err = 0;
    for (uint64_t at = 0; at < r->len; at += len) { /* in the request */
      len = u_min(bs - (r->off + at) % bs, r->len - at);
      if (len == bs)
        it[k++] = (struct cas_item){.lba = (r->off + at) / bs,
                                    .req = r,
                                    .data = r->buf + at,
                                    .expect = CAS_ANY};
      else if ((err = cas_part(s, im, r->type, r->buf + at, r->off + at, len)))
        r->err = err;
      if (k < CAS_BATCH &&
          (at + len < r->len || (n > 1 && r->type == r[1].type)))
        continue;
      if (writing) cas_put(s, im, it, k);
      if (writing) cas_kick(s);
      if (!writing) cas_read(s, im, it, k, CAS_DATA);
      if (!writing) cas_unpin(s, it, k);
      for (; k > 0; k--)
        if (it[k - 1].err) it[k - 1].req->err = it[k - 1].err;
    }
  }
}

/* Makes the whole blocks of a range holes: one log entry for many leaves. */
static int cas_trim(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  (void)flags;
  struct cas_image *im = ctx;
  struct nbdserve_cas *s = im->s;
  uint64_t from = cas_blocks(s, off), to = (off + len) / s->bs, span;
  uint32_t x;
  int err = 0;
  while (from < to && !err) {
    struct cas_item hole = {.lba = from};
    int k = 0, changed = 0;
    os_lock(&s->lock);
    err = cas_room(s);
    while (k < CAS_SEGMENT / CAS_LEVELS && from < to && !err) {
      err = cas_map(s, im, from, 0, &x, &span);
      if (!err && x) err = cas_map(s, im, from, 1, &hole.slot, NULL);
      if (err) break;
      if (x) changed = 1;
      from += u_min(span, to - from);
      if (from % s->fanout == 0) k++;
    }
    if (changed) cas_log(s, im, &hole, from - hole.lba);
    if (!err) err = s->failed;
    os_unlock(&s->lock);
  }
  cas_kick(s);
  return err;
}

/* Zeroes a range: whole blocks become holes, parts of blocks are written. */
static int cas_zero(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  struct cas_image *im = ctx;
  uint64_t bs = im->s->bs, tail = (off + len) % bs;
  uint64_t head = u_min((bs - off % bs) % bs, len);
  int zero = NBD_CMD_WRITE_ZEROES, err = 0;
  if (head) err = cas_part(im->s, im, zero, NULL, off, head);
  if (!err) err = cas_trim(ctx, off, len, flags);
  if (err || !tail || tail > len - head) return err;
  return cas_part(im->s, im, zero, NULL, off + len - tail, tail);
}

/* Reports blocks as data and the rest as holes. */
static int cas_extents(void *ctx, uint64_t off, uint64_t len, uint32_t flags,
                       struct nbdserve_extents *out) {
  (void)flags;
  struct cas_image *im = ctx;
  uint64_t bs = im->s->bs, end = off + len, span;
  uint32_t slot, hole = NBDSERVE_EXTENT_HOLE | NBDSERVE_EXTENT_ZERO;
  int err = 0, enough = 0;
  os_lock(&im->s->lock);
  while (off < end && !enough) {
    err = cas_map(im->s, im, off / bs, 0, &slot, &span);
    if (err) break;
    uint64_t next = u_min((off / bs + span) * bs, end);
    enough = nbdserve_extent(out, next - off, slot ? 0 : hole);
    off = next;
  }
  os_unlock(&im->s->lock);
  return err;
}

/* ops->flush: one sync for all who wait. */
static int cas_flush(void *ctx, uint32_t flags) {
  (void)flags;
  struct cas_image *im = ctx;
  return cas_sync(im->s, 0);
}

/* ops->close: the volume stays in the store. */
static void cas_close(void *ctx) {
  struct cas_image *im = ctx;
  os_lock(&im->s->lock);
  im->clients--;
  os_unlock(&im->s->lock);
}

/* ---- Opening ------------------------------------------------------------- */

/* A superblock's number; or -EINVAL: it is none, -EUCLEAN: damaged, others. */
static int64_t cas_get_super(struct nbdserve_cas *s, uint64_t off,
                             unsigned char *p) {
  int err = off + CAS_PAGE > s->end ? -EINVAL : cas_io(s, 0, p, CAS_PAGE, off);
  if (err || memcmp(p, CAS_MAGIC, 8) != 0) return err ? err : -EINVAL;
  if (!cas_stamp(s, p, CAS_SUM)) return -EUCLEAN;
  if (u_get32(p + 8) != 1 || u_get32(p + 64) ||
      (u_get32(p + 68) && !s->readonly))
    return -EOPNOTSUPP;
  return (int64_t)(u_get64(p + 32) & INT64_MAX);
}

/* Computes where everything lies, from block size and length of the log. */
static int cas_place(struct nbdserve_cas *s) {
  uint64_t end = 2 * CAS_UNIT + (uint64_t)s->log_pages * CAS_PAGE;
  if (!u_is_power_of_2(s->bs) || s->bs < CAS_MIN_BLOCK || s->bs > 65536 ||
      s->log_pages < 8 || s->log_pages > 1 << 24)
    return -EINVAL;
  s->data_off = (end + CAS_UNIT - 1) / CAS_UNIT * CAS_UNIT;
  s->fanout = CAS_FANOUT(s->bs);
  s->max_blocks = (uint64_t)s->fanout * s->fanout * s->fanout * s->fanout;
  return 0;
}

/* Takes what the newest superblock says, and makes both alike (C8). */
static int cas_open_super(struct nbdserve_cas *s) {
  unsigned char copy[2][CAS_PAGE];
  int64_t a = cas_get_super(s, 0, copy[0]);
  int64_t b = cas_get_super(s, CAS_UNIT, copy[1]);
  if (a < 0 && a != -EUCLEAN && (a != -EINVAL || b <= 0)) return (int)a;
  if (b == -EIO || (a < 0 && b < 0)) return -EIO; /* one may be damaged only */
  unsigned char *p = memcpy(s->super, copy[b > a], CAS_PAGE);
  s->bs = u_get32(p + 12);
  s->seq = s->tail = s->durable = u_get64(p + 40);
  s->log_pages = u_get32(p + 48);
  s->to_fill = u_get32(p + 52);
  s->next_id = u_get32(p + 60);
  if (cas_place(s) || s->to_fill < CAS_SEGMENT) return -EIO;
  if (a == b || s->readonly) return 0;
  int err = os_datasync(s->fd); /* what was read may be only in memory */
  if (!err) err = cas_io(s, 1, p, CAS_PAGE, b > a ? 0 : CAS_UNIT);
  return err ? err : os_datasync(s->fd);
}

/* Puts the page in slot x and all that hangs on it into memory, and counts
 * references.  While that goes on tag and next of a page say where it is. */
static int cas_load(struct nbdserve_cas *s, uint32_t x, int level,
                    uint32_t index, struct cas_node **out) {
  struct cas_node *b;
  int err = 0;
  if (!x) return 0;
  if (x >= s->nslots) return -EIO;
  if (CAS_AT(s, x, ref)) {
    b = (struct cas_node *)((uintptr_t)CAS_AT(s, x, tag) |
                            (uintptr_t)CAS_AT(s, x, next) << 16 << 16);
    if (!b || b->level != level) return -EIO;
    b->refs++;
    *out = b;
    return 0;
  }
  if (cas_own(s, out, level)) return -ENOMEM;
  b = *out;
  s->ndirty--;
  cas_hold(s, b->slot = x);
  CAS_AT(s, x, tag) = (uint32_t)(uintptr_t)b;
  CAS_AT(s, x, next) = (uint32_t)((uintptr_t)b >> 16 >> 16);
  unsigned char *page = NBDSERVE_MALLOC(s->bs);
  if (!page) return -ENOMEM;
  if (cas_get_page(s, x, CAS_MAP, level, index, page)) s->damaged = b->bad = 1;
  for (uint32_t c = 0; c < s->fanout && !b->bad && !err; c++) {
    uint32_t v = u_get32(page + CAS_HEAD + 4 * c);
    if (level)
      err = cas_load(s, v, level - 1, index * s->fanout + c, b->kid + c);
    else if (v >= s->nslots)
      err = -EIO;
    else
      cas_hold(s, b->e[c] = v);
  }
  NBDSERVE_FREE(page);
  return err;
}

/* Reads the catalog and all maps, and counts the references to each slot. */
static int cas_open_catalog(struct nbdserve_cas *s) {
  struct cas_image *im, *p;
  int err = 0;
  for (uint32_t x = u_get32(s->super + 56), k; x; x = u_get32(s->page + 12)) {
    err = cas_get_page(s, x, CAS_CAT, 0, 0, s->page);
    if (err || CAS_AT(s, x, ref)) return err ? err : -EIO; /* a loop */
    cas_hold(s, x); /* until there is a new one */
    cas_drop(s, x, &s->retired);
    for (k = (s->bs - CAS_HEAD) / CAS_RECORD; k-- > 0;) { /* last first */
      const unsigned char *record = s->page + CAS_HEAD + k * CAS_RECORD;
      if (!u_get32(record)) continue;
      im = u_zalloc(sizeof *im);
      if (!im) return -ENOMEM;
      memcpy(im->record, record, CAS_RECORD);
      im->record[CAS_RECORD - 1] = 0; /* a name ends */
      im->s = s;
      im->size = u_get64(im->record + CAS_SIZE);
      im->next = s->images;
      s->images = im;
      s->nimages++;
    }
  }
  for (im = s->images; im && !err; im = im->next) {
    for (p = s->images; p && u_get32(im->record + CAS_IS_SNAPSHOT); p = p->next)
      if (memcmp(p->record + CAS_ID, im->record + CAS_ORIGIN, 4) == 0)
        im->parent = p;
    if (!cas_is_name((char *)im->record + CAS_NAMED) ||
        cas_blocks(s, im->size) > s->max_blocks)
      err = -EIO;
    else if (u_get32(im->record + CAS_DEPTH) != CAS_LEVELS)
      err = -EOPNOTSUPP;
    else
      err = cas_load(s, u_get32(im->record + CAS_ROOT), CAS_LEVELS - 1, 0,
                     &im->root);
  }
  for (uint32_t x = 1; x < s->nslots; x++) {
    CAS_AT(s, x, tag) = CAS_AT(s, x, tag) || CAS_AT(s, x, next); /* a page */
    CAS_AT(s, x, next) = 0;
    if (s->damaged && !CAS_AT(s, x, ref)) cas_hold(s, x); /* who knows */
  }
  return err;
}

/* Reads a log page into s->log.  Returns whether it is valid and has that
 * number. */
static int cas_log_read(struct nbdserve_cas *s, uint64_t seq) {
  uint64_t off = 2 * CAS_UNIT + seq % s->log_pages * CAS_PAGE;
  if (off + CAS_PAGE > s->end) return 0; /* not written so far */
  int err = cas_io(s, 0, s->log, CAS_PAGE, off);
  if (err) s->log_damaged = 1;
  return !err && u_get32(s->log) == CAS_LOG &&
         u_get16(s->log + 4) <= CAS_ENTRIES && u_get64(s->log + 8) == seq &&
         !memcmp(s->log + 24, s->super + 16, 8) &&
         cas_stamp(s, s->log, CAS_SUM);
}

/* Applies an entry of the log to the maps (C9). */
static int cas_redo(struct nbdserve_cas *s, const unsigned char *p, int known) {
  struct cas_item it = {.lba = u_get64(p + 8),
                        .slot = u_get32(p + 4),
                        .data = s->page,
                        .state = known ? CAS_DIGEST : CAS_DATA | CAS_DIGEST};
  struct cas_image *im = s->images;
  while (im && memcmp(im->record + CAS_ID, p, 4) != 0)
    im = im->next;
  uint64_t blocks = im ? cas_blocks(s, im->size) : 0;
  if (it.lba >= blocks) return 0;
  if (!it.slot)
    return cas_trim(im, it.lba * s->bs,
                    u_min(blocks - it.lba, u_get64(p + 16)) * s->bs, 0);
  if (!known) { /* (C9) */
    if (cas_off(s, it.slot, CAS_DATA) + s->bs > s->end) return 0;
    if (cas_transfer(s, &it, 1, CAS_DATA, 0)) return it.err;
    cas_hash(s, &it, 1);
    if (memcmp(it.sum, p + 16, 32) != 0) return 0;
  }
  memcpy(it.sum, p + 16, 32);
  int err = cas_extend(s, it.slot);
  /* data, too: if that has failed it may be in memory only */
  if (!err && !s->readonly) err = cas_store(s, &it, 1);
  if (err) return err;
  cas_hold(s, it.slot);
  if (!known) CAS_AT(s, it.slot, tag) |= CAS_GOOD;
  return cas_map(s, im, it.lba, 1, &it.slot, NULL);
}

/* Brings the maps up to what the log says (C9). */
static int cas_replay(struct nbdserve_cas *s) {
  uint64_t end = s->tail;
  int err = 0;
  for (; end - s->tail < s->log_pages && cas_log_read(s, end); end++)
    s->durable = u_get64(s->log + 16);
  for (uint32_t i = 1; i < s->log_pages; i++)
    s->log_damaged |= cas_log_read(s, end + i) && u_get64(s->log + 16) > end;
  if (s->log_damaged && !s->readonly) return -EIO;
  for (uint64_t seq = s->tail; seq < end && !err; seq++) {
    if (!cas_log_read(s, seq)) return -EIO;
    for (unsigned i = 0; i < u_get16(s->log + 4) && !err; i++)
      if ((err = cas_redo(s, s->log + 32 + CAS_ENTRY * i, seq < s->durable)) ==
              -EIO &&
          s->damaged && s->readonly)
        err = 0; /* it is below a page that cannot be read */
  }
  s->seq = s->tail = s->durable = end + s->log_pages; /* (C10) */
  return err;
}

/* Frees a store; nothing is written. */
static void cas_destroy(struct nbdserve_cas *s) {
  os_lock(&s->lock);
  for (struct cas_image *im; (im = s->images);) {
    s->images = im->next;
    cas_unref(s, im->root);
    NBDSERVE_FREE(im);
  }
  os_unlock(&s->lock);
  while (s->ngroups > 0)
    NBDSERVE_FREE(s->groups[--s->ngroups]);
  os_monitor_free(&s->ckpt);
  os_monitor_free(&s->lock);
  if (s->fd >= 0) close(s->fd);
  NBDSERVE_FREE(s);
}

/* Makes a store in memory, as yet without a file; NULL without memory. */
static struct nbdserve_cas *cas_new(const struct nbdserve_cas_options *o) {
  struct nbdserve_cas *s = u_zalloc(sizeof *s);
  uint32_t flags = o ? o->flags : 0;
  if (!s) return NULL;
  s->fd = -1;
  s->readonly = (flags & NBDSERVE_CAS_READONLY) != 0;
  s->hw = os_has_hwsha();
  s->verify = flags & NBDSERVE_CAS_VERIFY ||
              (s->hw && !(flags & NBDSERVE_CAS_NO_VERIFY));
  if (!os_monitor_init(&s->ckpt) && !os_monitor_init(&s->lock)) return s;
  cas_destroy(s);
  return NULL;
}

/* Opens and locks the store's file. */
static int cas_open_file(struct nbdserve_cas *s, const char *path, int flags) {
  struct stat st;
  s->fd = open(path, flags | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0666);
  if (s->fd < 0 || fstat(s->fd, &st) < 0) return -errno;
  if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) return -EINVAL;
  s->is_device = S_ISBLK(st.st_mode);
  if (s->is_device && !s->readonly && os_is_readonly_device(s->fd))
    return -EROFS;
  off_t end = lseek(s->fd, 0, SEEK_END);
  if (end < 0) return -errno;
  s->end = (uint64_t)end;
  return os_lock_file(s->fd, s->readonly);
}

/* See nbdserve.h. */
int nbdserve_cas_open(const char *path, const struct nbdserve_cas_options *o,
                      struct nbdserve_cas **out) {
  struct nbdserve_cas *s = cas_new(o);
  if (!s) return -ENOMEM;
  int err = cas_open_file(s, path, s->readonly ? O_RDONLY : O_RDWR);
  if (!err) err = cas_open_super(s);
  if (!err) err = cas_extend(s, s->to_fill - 1);
  s->replaying = 1;
  if (!err) err = cas_open_catalog(s);
  if (!err) err = cas_replay(s);
  s->replaying = 0;
  for (uint32_t x = 1; x < s->nslots && !err; x++) {
    if (CAS_AT(s, x, ref) != CAS_FREED) continue;
    CAS_AT(s, x, ref) = 1;
    cas_drop(s, x, &s->retired);
  }
  if (!err && !s->readonly) err = cas_checkpoint(s, NULL);
  s->to_fill = s->nslots;
  if (!err) cas_kick(s);
  if (err) cas_destroy(s);
  if (!err) *out = s;
  return err;
}

/* See nbdserve.h. */
int nbdserve_cas_close(struct nbdserve_cas *s) {
  os_lock(&s->lock);
  s->closing = 1;
  while (s->busy)
    os_wait(&s->lock);
  int err = s->failed;
  os_unlock(&s->lock);
  if (!err && !s->readonly && (s->nlogged > s->nsynced || s->seq > s->tail))
    err = cas_checkpoint(s, NULL);
  cas_destroy(s);
  return err;
}

/* See nbdserve.h. */
int nbdserve_cas_init(const char *path, const struct nbdserve_cas_options *o) {
  struct nbdserve_cas *s = cas_new(o);
  if (!s) return -ENOMEM;
  s->bs = o && o->block_size ? o->block_size : CAS_MIN_BLOCK;
  s->log_pages = o && o->log_pages ? o->log_pages : 4096;
  s->seq = s->next_id = 1;
  int err = cas_place(s);
  if (!err) err = cas_open_file(s, path, O_RDWR | O_CREAT | O_EXCL);
  int is_new = s->fd >= 0 && err != -EBUSY; /* else another one has it now */
  if (err == -EEXIST && !cas_open_file(s, path, O_RDWR) && s->is_device &&
      !cas_io(s, 0, s->super, CAS_PAGE, 0) && u_is_zero(s->super, CAS_PAGE))
    err = 0; /* an unused block device will do */
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t); /* for an id that no other store has */
  memcpy(s->super, CAS_MAGIC, 8);
  u_put32(s->super + 8, 1);
  u_put32(s->super + 12, s->bs);
  u_put64(s->super + 16, (uint64_t)t.tv_sec << 30 ^ (uint64_t)t.tv_nsec);
  u_put64(s->super + 24, (uint64_t)getpid() << 32 ^ (uint64_t)(uintptr_t)s);
  u_put32(s->super + 48, s->log_pages);
  if (!err) err = cas_checkpoint(s, NULL); /* of nothing at all */
  if (!err) err = os_sync_new_file(s->fd, path);
  if (err && is_new) os_remove_own_file(path, s->fd);
  cas_destroy(s);
  return err;
}

/* ---- The public calls ---------------------------------------------------- */

static const struct nbdserve_ops cas_ops = {
    .read = ex_batched_read,
    .write = ex_batched_write,
    .flush = cas_flush,
    .trim = cas_trim,
    .zero = cas_zero,
    .extents = cas_extents,
    .close = cas_close,
    .run_batch = cas_batch,
};

/* See nbdserve.h. */
int nbdserve_cas_volume(struct nbdserve_cas *s, const char *name,
                        struct nbdserve_export *out) {
  os_lock(&s->ckpt); /* one that is under way may be changing what it is */
  os_lock(&s->lock);
  struct cas_image *im = cas_find(s, name, strlen(name));
  int err = s->failed;
  if (!err && !im) err = -ENOENT;
  if (!err) {
    if (!im->own.run_batch)
      im->own.run_batch = cas_batch; /* others may be using it */
    im->clients++;
    out->size = im->size;
    out->preferred_block = s->bs;
    out->flags |= NBDSERVE_EXPORT_MULTI_CONN;
    if (im->parent || s->readonly) out->flags |= NBDSERVE_EXPORT_READONLY;
    out->ops = &cas_ops;
    out->ctx = im;
  }
  os_unlock(&s->lock);
  os_unlock(&s->ckpt);
  return err;
}

/* Zeroes what is behind the end of a volume: that is of no account while it is
 * there, but has to be zero when it grows, and takes space after it shrank; and
 * in a snapshot it would count for the id. */
static int cas_clear_tail(struct cas_image *im) {
  uint64_t bs = im->s->bs, end = u_min(im->s->max_blocks, INT64_MAX / bs) * bs;
  return im->size < end ? cas_zero(im, im->size, end - im->size, 0) : 0;
}

/* See nbdserve.h. */
int nbdserve_cas_change(struct nbdserve_cas *s, int verb, const char *name,
                        const char *to, uint64_t size) {
  struct cas_op op = {verb, name, to, size};
  struct nbdserve_export e = {0}; /* open: no other one may resize it */
  char part[CAS_PATH];
  int resize = verb == NBDSERVE_CAS_RESIZE, err = s->readonly ? -EROFS : 0;
  os_lock(&s->lock); /* what is to be written now may be there already */
  while (verb == NBDSERVE_CAS_CREATE && s->busy)
    os_wait(&s->lock);
  os_unlock(&s->lock);
  snprintf(part, sizeof part, "%.*s", (int)strcspn(name, "@"), name);
  if (!err && (resize || verb == NBDSERVE_CAS_SNAPSHOT))
    err = nbdserve_cas_volume(s, part, &e);
  if (!err && e.ctx) err = cas_clear_tail(e.ctx);
  if (!err) err = cas_checkpoint(s, &op);
  if (!err && resize) cas_clear_tail(e.ctx);
  if (e.ctx) cas_close(e.ctx);
  return err;
}

/* See nbdserve.h. */
int nbdserve_cas_list(struct nbdserve_cas *s, nbdserve_list_fn *each,
                      void *arg) {
  char name[CAS_PATH], id[72];
  int r = 0;
  os_lock(&s->lock);
  for (struct cas_image *im = s->images; im && !r; im = im->next) {
    struct nbdserve_cas_info info = {cas_name(im, name),
                                     im->size,
                                     u_get64(im->record + CAS_CREATED),
                                     (uint32_t)im->clients,
                                     im->parent != NULL,
                                     cas_spell(im, id)};
    im->clients++; /* it stays in the list */
    os_unlock(&s->lock);
    r = each(arg, &info);
    os_lock(&s->lock);
    im->clients--;
  }
  os_unlock(&s->lock);
  return r;
}

/* See nbdserve.h. */
int nbdserve_cas_seal(struct nbdserve_cas *s, const char *name, char id[72],
                      nbdserve_progress_fn *progress, void *arg) {
  unsigned char run[32 + 32 * CAS_BATCH], *data; /* see the format of an id */
  struct cas_item it[CAS_BATCH];
  struct nbdserve_export e = {0};
  int err = nbdserve_cas_volume(s, name, &e);
  *id = 0;
  if (err) return err;
  struct cas_image *im = e.ctx;
  os_lock(&s->lock);
  int sealed = *cas_spell(im, id) != 0;
  os_unlock(&s->lock);
  uint64_t blocks = sealed ? 0 : cas_blocks(s, im->size);
  if (!im->parent) err = -EINVAL;
  if (!err && !sealed && s->readonly) err = -EROFS;
  if (!(data = NBDSERVE_MALLOC(CAS_BATCH * s->bs))) err = -ENOMEM;
  memcpy(run, "nbdserve-cid-1", 14);
  u_put32(run + 14, s->bs);
  u_put64(run + 18, im->size);
  sha_256(s->hw, run, NULL, 26, run, NULL);
  for (uint64_t lba = 0; lba < blocks && !err; lba += CAS_BATCH) {
    size_t n = (size_t)u_min(blocks - lba, CAS_BATCH), i;
    for (i = 0; i < n; i++)
      it[i] = (struct cas_item){.lba = lba + i, .data = data + i * s->bs};
    err = progress && progress(arg, lba * s->bs, im->size)
              ? -ECANCELED
              : cas_read(s, im, it, n, CAS_DIGEST);
    cas_unpin(s, it, n);
    memset(run + 32, 0, sizeof run - 32);
    for (i = 0; i < n; i++)
      memcpy(run + 32 + 32 * i, it[i].digest, 32);
    sha_256(s->hw, run, NULL, sizeof run, run, NULL);
  }
  NBDSERVE_FREE(data);
  if (!err && !sealed) {
    os_lock(&s->lock);
    memcpy(im->record + CAS_CID, run, 32); /* and it stays true if this fails */
    os_unlock(&s->lock);
    err = cas_checkpoint(s, NULL);
  }
  if (!err) cas_spell(im, id); /* from now on it is fixed */
  if (err) *id = 0;
  cas_close(im);
  return err;
}

/* See nbdserve.h. */
int nbdserve_cas_diff(struct nbdserve_cas *s, const char *a, const char *b,
                      nbdserve_range_fn *each, void *arg) {
  struct nbdserve_export e = {0}, f = {0};
  int err = nbdserve_cas_volume(s, a, &e), same;
  if (err) return err;
  err = nbdserve_cas_volume(s, b, &f);
  struct cas_image *im[2] = {e.ctx, f.ctx};
  uint64_t size = e.size > f.size ? e.size : f.size, from = 0, lba = 0, span;
  for (; lba < cas_blocks(s, size) && !err; lba += span) {
    err = cas_same(s, im, lba, &span, &same);
    if (err || !same) continue;
    if (from < lba) err = each(arg, from * s->bs, (lba - from) * s->bs);
    from = lba + span;
  }
  if (!err && from < lba) err = each(arg, from * s->bs, size - from * s->bs);
  if (f.ctx) cas_close(f.ctx);
  cas_close(e.ctx);
  return err;
}

/* See nbdserve.h. */
void nbdserve_cas_stat(struct nbdserve_cas *s, struct nbdserve_cas_stat *out) {
  os_lock(&s->lock);
  *out = (struct nbdserve_cas_stat){
      .block_size = s->bs,
      .free = (uint64_t)s->nfree * s->bs,
      .stored = (uint64_t)(s->nslots - s->nfree - s->nwaiting - 1) * s->bs,
      .file = (uint64_t)lseek(s->fd, 0, SEEK_END),
      .log = (s->seq - s->tail) * 100 / s->log_pages};
  os_unlock(&s->lock);
}

/* See nbdserve.h. */
int nbdserve_cas_verify(struct nbdserve_cas *s, nbdserve_damage_fn *each,
                        nbdserve_progress_fn *progress, void *arg) {
  unsigned char *data = NBDSERVE_MALLOC(CAS_BATCH * s->bs);
  int found = s->log_damaged, stop = 0;
  struct cas_item it[CAS_BATCH];
  uint64_t done = 0, total = 0;
  char name[CAS_PATH];
  struct cas_image *im;
  if (!data) return -ENOMEM;
  if (found) each(arg, "", 0, 0, "the log is damaged");
  os_lock(&s->ckpt);
  for (unsigned i = 0; i < 2; i++) {
    if (cas_get_super(s, i * CAS_UNIT, data) >= 0) continue;
    each(arg, "", 0, 0,
         i ? "the second superblock is damaged"
           : "the first superblock is damaged");
    found = 1;
  }
  os_lock(&s->lock); /* read-only: what is in memory has been checked */
  for (uint32_t x = 1; x < s->nslots && !s->readonly; x++) {
    if (CAS_AT(s, x, tag) != 1) continue; /* cas_take_page */
    os_unlock(&s->lock);
    int bad = cas_io(s, 0, data, s->bs, cas_off(s, x, CAS_DATA)) ||
              !cas_stamp(s, data, CAS_CHECK);
    if (bad) each(arg, "", 0, 0, "a page of a map or the catalog is damaged");
    found |= bad;
    os_lock(&s->lock);
  }
  os_unlock(&s->ckpt);
  for (uint32_t x = 0; x < s->nslots && !s->readonly; x++)
    CAS_AT(s, x, tag) &= ~CAS_GOOD;
  for (im = s->images; im; im = im->next)
    total += im->size;
  for (im = s->images; im && !stop; im = im->next) {
    im->clients++; /* it stays in the list */
    cas_name(im, name);
    os_unlock(&s->lock);
    const char *why = NULL;
    uint64_t blocks = cas_blocks(s, im->size), from = 0;
    for (uint64_t lba = 0, n; lba < blocks && !stop; lba += n) {
      n = u_min(blocks - lba, CAS_BATCH);
      stop = progress && progress(arg, done += n * s->bs, total);
      for (size_t i = 0; i < n; i++)
        it[i] = (struct cas_item){.lba = lba + i, .data = data + i * s->bs};
      if (cas_read(s, im, it, (size_t)n, 0)) found = 1;
      for (size_t i = 0; i < n; i++) {
        const char *next = !it[i].err   ? NULL
                           : it[i].slot ? "the data is not what it was"
                                        : "the map cannot be read";
        if (next == why) continue;
        if (why) each(arg, name, from, (lba + i) * s->bs - from, why);
        from = (lba + i) * s->bs;
        why = next;
      }
      cas_unpin(s, it, (size_t)n);
    }
    if (why && !stop) each(arg, name, from, im->size - from, why);
    os_lock(&s->lock);
    im->clients--;
  }
  os_unlock(&s->lock);
  NBDSERVE_FREE(data);
  return stop ? -ECANCELED : found ? -EUCLEAN : 0;
}

/* See nbdserve.h. */
int nbdserve_cas_gc(struct nbdserve_cas *s, uint64_t *bytes,
                    nbdserve_progress_fn *progress, void *arg) {
  int err = s->readonly ? -EROFS : cas_checkpoint(s, NULL);
  if (!err && s->damaged) err = -EUCLEAN; /* who knows what is free */
  os_lock(&s->lock);
  uint32_t nslots = s->nslots;
  *bytes = (uint64_t)s->nfree * s->bs;
  os_unlock(&s->lock);
  for (uint32_t x = 0; !err && x < nslots; x += CAS_SEGMENT) {
    os_lock(&s->lock); /* what is free stays so meanwhile */
    for (uint32_t i = x, n; i < x + CAS_SEGMENT && !err; i += n + 1) {
      for (n = 0; i + n < x + CAS_SEGMENT && !CAS_AT(s, i + n, ref);)
        n++;
      if (n)
        err = os_fallocate(s->fd, OS_PUNCH_HOLE, cas_off(s, i, CAS_DATA),
                           (uint64_t)n * s->bs);
    }
    os_unlock(&s->lock);
    if (!err && progress && progress(arg, x, nslots)) err = -ECANCELED;
  }
  return err;
}

#endif /* !NBDSERVE_NO_CAS */

/* ==== [12] SERVER (srv_) =================================================
 * Listeners, clients and the public calls.
 *
 * Who may call what, and when; nbdserve.h says it for users:
 *
 *   before nbdserve_run           nbdserve_new, _add, _listen, _uri
 *   the thread of nbdserve_run,   nbdserve_unlisten
 *   while it is not in it
 *   any thread, at any time       nbdserve_serve, _resize, _stats
 *   the same, and signal handlers nbdserve_stop, _wake
 *   when no other call runs       nbdserve_free
 *
 * The life of a client, each step a function below or in the sections above:
 *
 *   srv_accept        takes its socket from the kernel
 *   srv_new_client    makes struct conn, puts it on the list
 *   srv_thread        the thread that all of the rest happens in
 *   hs_run            the handshake; hs_enter_name where there is none
 *   tx_run            its requests, to the last answer
 *   io_linger         waits until the answers have arrived, where it must
 *   ex_release        gives back the export
 *   srv_free_client   takes it off the list, closes its socket
 *
 * (S1) A client is on s->conns while it is there, so that srv_finish finds it.
 * (S2) A client's thread leaves that list under s->lock, and touches s no more
 *      once it has given that lock back.
 * (S3) Stopping has one order, and each step is here or named here:
 *        1. No new clients: the listeners are closed (nbdserve_unlisten).
 *        2. The command's part: a captive command is told, and served until it
 *           has ended ([13], cli_serve).
 *        3. No new requests: nbdserve_stop makes the stop pipe readable, and
 *           srv_finish shuts down the receiving side of unix sockets.
 *        4. What was sent before is done and answered, in the clients' threads.
 *        5. TCP: io_linger, so that these answers arrive.
 *        6. When the grace is over, srv_finish cuts off who is left.  There is
 *           one grace for all of 3 to 5 (I3).  A thread inside a backend is
 *           waited for without limit: nothing can end it.
 *        7. All exports are flushed.
 *        8. nbdserve_free closes them.
 * (S4) nbdserve_wake, nbdserve_stop and a client that leaves have a pipe each.
 *      That a pipe is readable says it all, so a full one loses nothing. */

enum {
  SRV_OWN_FDS = 3,          /* that nbdserve_run looks at before listeners */
  SRV_BACKLOG = 128,        /* connections that the kernel keeps waiting */
  SRV_PAUSE_MS = 100,       /* after an accept() that failed: do not spin */
  SRV_TELL_FULL_MS = 60000, /* between two messages that clients wait */
  SRV_PORT_TRIES = 16,      /* ports for localhost that the kernel picks */
  SRV_LOCK_TRIES = 100,     /* so far apart: see srv_lock_dir */
  SRV_LOCK_PAUSE_MS = 10,
  SRV_MAX_THREADS = 1024,
  SRV_MAX_CONN = 1 << 20
};

union srv_address {
  struct sockaddr sa;
  struct sockaddr_un un;
  struct sockaddr_in in;   /* its port lies where that of... */
  struct sockaddr_in6 in6; /* ...this one does, on every system */
};

/* ---- Making a server ----------------------------------------------------- */

/* See nbdserve.h. */
const char *nbdserve_version(void) {
  return NBDSERVE_VERSION;
}

/* Fills in what the host has left at 0, and what follows from what it wants. */
static void srv_fill_defaults(struct nbdserve_config *k) {
  if (!k->threads) k->threads = 16;
  if (!k->max_conn) k->max_conn = 128;
  if (NBDSERVE_NO_THREADS) k->max_conn = k->threads = 1;
  if (!k->handshake_ms) k->handshake_ms = 10000;
  if (!k->stall_ms) k->stall_ms = 120000;
  /* Fast zeroes are zeroes, and extended headers need GO. */
  if (k->without & NBD_FLAG_SEND_WRITE_ZEROES)
    k->without |= NBD_FLAG_SEND_FAST_ZERO;
  if (k->without & 1u << (HS_WITHOUT_OPTIONS + NBD_OPT_GO))
    k->without |= 1u << (HS_WITHOUT_OPTIONS + NBD_OPT_EXTENDED_HEADERS);
  assert(k->threads && k->max_conn && k->handshake_ms && k->stall_ms);
}

/* See nbdserve.h.  Until it has succeeded nobody else knows the server. */
int nbdserve_new(struct nbdserve **out, const struct nbdserve_config *config) {
  struct nbdserve_config k = {.version = NBDSERVE_VERSION_NUMBER};
  *out = NULL;
  /* Of another version the rest of *config may not even be there. */
  if (config && config->version / 100 != NBDSERVE_VERSION_NUMBER / 100)
    return -EINVAL;
  if (config) k = *config;
  srv_fill_defaults(&k);
  if (k.threads > SRV_MAX_THREADS || k.max_conn > SRV_MAX_CONN ||
      k.flags & ~NBDSERVE_CONFIG_ONCE)
    return -EINVAL;
  struct nbdserve *s = u_zalloc(sizeof *s);
  if (!s) return -ENOMEM;
  int err = os_monitors_init(&s->lock, &s->stop.lock);
  if (err) {
    NBDSERVE_FREE(s);
    return err;
  }
  s->config = k;
  s->last_export = &s->exports;
  memset(s->stop.pipe, -1, sizeof s->stop.pipe); /* all bits set: -1 */
  memset(s->wake, -1, sizeof s->wake);
  memset(s->noticed, -1, sizeof s->noticed);
  err = os_pipe(s->stop.pipe);
  if (!err) err = os_pipe(s->wake);
  if (!err) err = os_pipe(s->noticed);
  if (!err) *out = s;
  s->finished = err != 0; /* then nothing has begun */
  if (err) nbdserve_free(s);
  return err;
}

/* See nbdserve.h.  After an error no export was made: ctx is the caller's. */
int nbdserve_add(struct nbdserve *s, const struct nbdserve_export *e) {
  struct ex *ex = NULL;
  os_lock(&s->lock);
  int is_taken = ex_by_name(s, e->name ? e->name : "") != NULL;
  int err = is_taken ? -EEXIST : ex_new(s, e, &ex);
  if (!err) {
    *s->last_export = ex;
    s->last_export = &ex->next;
  }
  os_unlock(&s->lock);
  return err;
}

/* See nbdserve.h.  Clients that are there keep the size that they were told. */
int nbdserve_resize(struct nbdserve *s, const char *name, uint64_t size) {
  if (size > INT64_MAX) return -EINVAL;
  os_lock(&s->lock);
  struct ex *ex = ex_by_name(s, name ? name : "");
  if (ex) ex->pub.size = size;
  os_unlock(&s->lock);
  return ex ? 0 : -ENOENT;
}

/* ---- Listening ----------------------------------------------------------- */

/* Adds a listener on fd, which the server owns from now on.  text: the path of
 * a unix socket, HOST:PORT of a TCP one, or "". */
static void srv_add_listener(struct nbdserve *s, int fd, int is_unix,
                             const char *text) {
  assert(fd >= 0 && s->nlisteners <= SRV_LISTENERS);
  struct srv_listener *l = &s->listeners[s->nlisteners++];
  os_set_fd_flags(fd, OS_NONBLOCKING);
  l->fd = fd;
  l->is_unix = is_unix && lstat(text, &l->st) == 0;
  snprintf(l->text, sizeof l->text, "%s", text);
}

/* Closes the newest listener, and removes its unix socket unless another one
 * has taken its place. */
static void srv_drop_listener(struct nbdserve *s) {
  struct stat st;
  assert(s->nlisteners > 0);
  struct srv_listener *l = &s->listeners[--s->nlisteners];
  close(l->fd);
  if (l->is_unix && lstat(l->text, &st) == 0 && st.st_ino == l->st.st_ino &&
      st.st_dev == l->st.st_dev)
    unlink(l->text);
}

/* See nbdserve.h. */
void nbdserve_unlisten(struct nbdserve *s) {
  while (s->nlisteners > 0)
    srv_drop_listener(s);
}

/* What a socket is made for. */
enum srv_use {
  SRV_LISTEN,
  SRV_CONNECT,
  SRV_PROBE /* connect, but without waiting: does anybody listen? */
};

/* Makes a socket that listens at an address or is connected to it.  A
 * descriptor, or -errno. */
static int srv_socket(const union srv_address *a, socklen_t len,
                      enum srv_use use) {
  int fd = socket(a->sa.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return -errno;
  os_set_fd_flags(fd, use == SRV_CONNECT ? OS_BLOCKING : OS_NONBLOCKING);
  int r;
  if (use == SRV_LISTEN) {
    /* A socket of another family heeds neither of these. */
    os_set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
    os_set_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
    r = bind(fd, &a->sa, len);
    if (r == 0) r = listen(fd, SRV_BACKLOG);
  } else {
    r = connect(fd, &a->sa, len);
  }
  if (r == 0) return fd;
  int err = -errno;
  close(fd);
  return err;
}

/* Keeps other servers from looking at the sockets of a directory, for a second
 * at most: between bind() and listen() a socket refuses connections, and to
 * another server that comes just then it looks like a leftover.  The descriptor
 * that holds the lock, or a negative number. */
static int srv_lock_dir(const char *path) {
  int dir = os_open_dir(path);
  for (int i = 0; dir >= 0 && i < SRV_LOCK_TRIES; i++) {
    if (flock(dir, LOCK_EX | LOCK_NB) == 0) break;
    if (errno != EWOULDBLOCK) break; /* no locks here: go on without */
    poll(NULL, 0, SRV_LOCK_PAUSE_MS);
  }
  return dir;
}

/* Removes a unix socket on which nobody listens.  True: it is gone. */
static int srv_remove_leftover(const union srv_address *a) {
  struct stat st;
  if (lstat(a->un.sun_path, &st) < 0 || !S_ISSOCK(st.st_mode)) return 0;
  int fd = srv_socket(a, sizeof a->un, SRV_PROBE);
  if (fd >= 0) close(fd);
  return fd == -ECONNREFUSED && unlink(a->un.sun_path) == 0;
}

/* Makes a unix socket for that use; a leftover in its place is replaced.  A
 * descriptor, or -errno. */
static int srv_unix_socket(const char *path, enum srv_use use) {
  union srv_address a = {.un = {.sun_family = AF_UNIX}};
  if (!*path) return -EINVAL;
  if (strlen(path) >= sizeof a.un.sun_path) return -ENAMETOOLONG;
  strcpy(a.un.sun_path, path);
  if (use != SRV_LISTEN) return srv_socket(&a, sizeof a.un, use);
  int dir = srv_lock_dir(path);
  int fd = srv_socket(&a, sizeof a.un, SRV_LISTEN);
  if (fd == -EADDRINUSE && srv_remove_leftover(&a))
    fd = srv_socket(&a, sizeof a.un, SRV_LISTEN);
  if (dir >= 0) close(dir);
  return fd;
}

#if !NBDSERVE_NO_TCP
/* Where the bytes of an internet address stand. */
static void *srv_ip(union srv_address *a) {
  return a->sa.sa_family == AF_INET6 ? (void *)&a->in6.sin6_addr
                                     : (void *)&a->in.sin_addr;
}

/* Writes an internet address to out[size], as people and URIs have it; another
 * address leaves it as it is. */
static void srv_format_address(union srv_address *a, char *out, size_t size) {
  char host[INET6_ADDRSTRLEN];
  int is_v6 = a->sa.sa_family == AF_INET6;
  if (inet_ntop(a->sa.sa_family, srv_ip(a), host, sizeof host))
    snprintf(out, size, is_v6 ? "[%s]:%d" : "%s:%d", host,
             ntohs(a->in.sin_port));
}

/* Listens on a numeric address; *port 0 becomes the port that the kernel
 * picked.  0 or -errno. */
static int srv_listen_ip(struct nbdserve *s, const char *host, uint64_t *port) {
  union srv_address a = {.in6 = {.sin6_port = htons((uint16_t)*port)}};
  int is_v6 = strchr(host, ':') != NULL;
  socklen_t len = is_v6 ? sizeof a.in6 : sizeof a.in;
  char text[64] = "";
  assert(*port <= 65535);
  a.sa.sa_family = is_v6 ? AF_INET6 : AF_INET;
  if (inet_pton(a.sa.sa_family, host, srv_ip(&a)) != 1) return -EINVAL;
  int fd = srv_socket(&a, len, SRV_LISTEN);
  if (fd < 0) return fd;
  getsockname(fd, &a.sa, &len);
  *port = ntohs(a.in.sin_port);
  srv_format_address(&a, text, sizeof text);
  srv_add_listener(s, fd, 0, text);
  return 0;
}

/* Listens on both loopback addresses, at the same port.  A port that the kernel
 * picked for one may be taken on the other: then it picks another one. */
static int srv_listen_localhost(struct nbdserve *s, uint64_t port) {
  int err = 0;
  for (int i = 0; i < SRV_PORT_TRIES; i++) {
    uint64_t picked = port;
    err = srv_listen_ip(s, "127.0.0.1", &picked);
    if (err) return err;
    err = srv_listen_ip(s, "::1", &picked);
    if (err == -EAFNOSUPPORT || err == -EADDRNOTAVAIL) return 0; /* no IPv6 */
    if (!err) return 0;
    srv_drop_listener(s); /* nothing half done */
    if (err != -EADDRINUSE || port) return err;
  }
  return err;
}

/* Listens at HOST:PORT or [HOST]:PORT. */
static int srv_listen_tcp(struct nbdserve *s, const char *address) {
  const char *colon = strrchr(address, ':');
  uint64_t port = 0;
  char host[64];
  if (!colon || !u_parse_number(colon + 1, 65535, &port)) return -EINVAL;
  int len = (int)(colon - address);
  if (len > 1 && *address == '[' && colon[-1] == ']') {
    address++;
    len -= 2;
  }
  if (snprintf(host, sizeof host, "%.*s", len, address) >= (int)sizeof host)
    return -EINVAL;
  if (strcmp(host, "localhost") == 0) return srv_listen_localhost(s, port);
  return srv_listen_ip(s, host, &port);
}
#else
/* Without TCP there are no such addresses. */
#define srv_format_address(a, out, size) ((void)(a), (void)(out), (void)(size))

/* Without TCP no address is one. */
#define srv_listen_tcp(s, address) ((void)(s), (void)(address), -EINVAL)
#endif

/* Takes over a listening socket that is open already. */
static int srv_listen_fd(struct nbdserve *s, const char *number) {
  uint64_t fd;
  int listens = 0;
  socklen_t len = sizeof listens;
  if (!u_parse_number(number, INT_MAX, &fd)) return -EINVAL;
  if (getsockopt((int)fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &len) < 0)
    return -errno;
  if (!listens) return -EINVAL;
  srv_add_listener(s, (int)fd, 0, "");
  return 0;
}

/* See nbdserve.h. */
int nbdserve_listen(struct nbdserve *s, const char *address) {
  if (s->nlisteners >= SRV_LISTENERS) return -EMFILE;
  if (strncmp(address, "tcp:", 4) == 0) return srv_listen_tcp(s, address + 4);
  if (strncmp(address, "fd:", 3) == 0) return srv_listen_fd(s, address + 3);
  if (strncmp(address, "unix:", 5) != 0) return -EINVAL;
  const char *path = address + 5;
  int fd = srv_unix_socket(path, SRV_LISTEN);
  if (fd < 0) return fd;
  srv_add_listener(s, fd, 1, path);
  return 0;
}

/* See nbdserve.h.  The first listener counts. */
int nbdserve_uri(struct nbdserve *s, const char *name, char *buf, size_t size) {
  static const char socket_query[] = "?socket=";
  const struct srv_listener *l = s->listeners;
  if (!s->nlisteners || !*l->text) return -ENOENT;
  int n = snprintf(buf, size, "nbd%s://%s/", l->is_unix ? "+unix" : "",
                   l->is_unix ? "" : l->text);
  if ((size_t)n >= size) return -ERANGE;
  if (!u_append_uri(buf, size, name ? name : "")) return -ERANGE;
  if (!l->is_unix) return 0;
  if (strlen(buf) + sizeof socket_query > size) return -ERANGE;
  strcat(buf, socket_query);
  return u_append_uri(buf, size, l->text) ? 0 : -ERANGE;
}

/* ---- Signals from other threads and handlers ----------------------------- */

/* Makes a pipe readable.  Async-signal-safe, and keeps errno.  A full pipe is
 * readable already (S4). */
static void srv_poke(int fd) {
  int saved = errno;
  (void)!write(fd, "", 1);
  errno = saved;
}

/* Empties a pipe.  True: there was something in it. */
static int srv_take_poke(int fd) {
  char waste[64];
  int found = 0;
  while (read(fd, waste, sizeof waste) > 0)
    found = 1;
  return found;
}

/* See nbdserve.h.  Nobody ever empties this pipe: there is no way back. */
void nbdserve_stop(struct nbdserve *s) {
  srv_poke(s->stop.pipe[1]);
}

/* See nbdserve.h. */
void nbdserve_wake(struct nbdserve *s) {
  srv_poke(s->wake[1]);
}

/* ---- Statistics ---------------------------------------------------------- */

/* Adds what was counted for one client.  The caller holds s->lock. */
static void srv_add_stats(struct nbdserve_stats *to, const struct conn *c) {
  to->requests += c->stats.requests;
  to->errors += c->stats.errors;
  to->bytes_read += c->stats.bytes_read;
  to->bytes_written += c->stats.bytes_written;
}

/* See nbdserve.h.  Each client counts for itself; here the counters are added,
 * to those of the clients that have left. */
void nbdserve_stats(struct nbdserve *s, struct nbdserve_stats *out) {
  os_lock(&s->lock);
  *out = s->totals;
  out->clients_now = s->nconns;
  for (struct conn *c = s->conns; c; c = c->next) {
    os_lock(&c->queue_lock);
    srv_add_stats(out, c);
    os_unlock(&c->queue_lock);
  }
  os_unlock(&s->lock);
}

/* ---- A client's life ----------------------------------------------------- */

/* Sets up how a connection waits and is stopped: the table at the head of
 * [6]. */
static void srv_setup_io(struct conn *c, int in, int out) {
  uint32_t stall_ms = c->s->config.stall_ms;
  union srv_address a = {.sa = {.sa_family = AF_UNSPEC}}; /* a pipe's */
  socklen_t len = sizeof a;
  getpeername(out, &a.sa, &len);
  c->is_tcp = a.sa.sa_family == AF_INET || a.sa.sa_family == AF_INET6;
  c->io.in = in;
  c->io.out = out;
  c->io.stop = &c->s->stop;
  c->io.stall_ms = stall_ms;
  /* Without threads it is nbdserve_run that serves: nobody would shut down. */
  c->io.polls_payloads = c->fd < 0 || NBDSERVE_NO_THREADS;
  c->io.polls_requests = c->io.polls_payloads || c->is_tcp;
  if (c->fd >= 0) os_set_receive_timeout(in, stall_ms);
  os_setup_client(out);
  if (c->is_tcp) os_setup_tcp(out);
}

/* Makes a client and registers it (S1).  fd: a socket that is closed in the
 * end, or -1.  NULL: no memory; all descriptors stay the caller's. */
static struct conn *srv_new_client(struct nbdserve *s, int in, int out,
                                   int fd) {
  struct conn *c = NBDSERVE_MALLOC(sizeof *c);
  if (!c) return NULL;
  memset(c, 0, offsetof(struct conn, rbuf)); /* the rest stays untouched */
  c->s = s;
  c->fd = fd;
  c->queue_end = &c->queue;
  if (os_monitors_init(&c->queue_lock, &c->send_lock)) {
    NBDSERVE_FREE(c);
    return NULL;
  }
  srv_setup_io(c, in, out);
  os_lock(&s->lock);
  c->id = (int)++s->totals.clients;
  c->next = s->conns;
  s->conns = c;
  s->nconns++;
  os_unlock(&s->lock);
  return c;
}

/* Takes a client off the list, closes its socket if it is ours, and frees
 * it. */
static void srv_free_client(struct conn *c) {
  struct nbdserve *s = c->s;
  assert(!c->nworkers && !c->nhanded_over);
  NBDSERVE_FREE(c->piece_buf);
  os_lock(&s->lock);
  struct conn **p = &s->conns;
  assert(s->nconns > 0);
  while (*p != c)
    p = &(*p)->next;
  *p = c->next;
  s->nconns--;
  if (!s->nconns) s->idle_since = os_now_ms();
  srv_add_stats(&s->totals, c);
  /* Locked, so that srv_finish does not shut down another file of that
   * number. */
  if (c->fd >= 0) close(c->fd);
  os_monitor_free(&c->queue_lock);
  os_monitor_free(&c->send_lock);
  NBDSERVE_FREE(c);
  srv_poke(s->noticed[1]);
  os_unlock(&s->lock); /* (S2) */
}

/* Flushes an export before it is closed, if it can have been written.  Nobody
 * can ask for that any more, nor be told if it fails, except the host.  Returns
 * 0 or -errno. */
static int srv_last_flush(struct ex *ex) {
  if (ex->pub.flags & NBDSERVE_EXPORT_READONLY) return 0;
  int err = ex_flush(ex);
  if (err)
    u_log(&ex->server->config, NBDSERVE_LOG_ERROR,
          "export '%s': the last flush: %s; written data may be lost",
          ex->pub.name, u_errno_text(err));
  return err;
}

/* Must a connection linger?  end: how it ends, CONN_LEFT or -errno.  Only a TCP
 * socket of ours, and only if it is our side that ends it while the client may
 * be sending: one that leaves in order sends nothing more, and one that is too
 * slow, or does not even come to transmission, gets no more of our time. */
static int srv_must_linger(const struct conn *c, int end) {
  return c->is_tcp && c->fd >= 0 && c->export && !c->send_err && end < 0 &&
         end != -ETIMEDOUT;
}

/* Serves a client to its end and frees it.  name: as in nbdserve_serve.
 * Returns 0 or -errno. */
static int srv_serve_client(struct conn *c, const char *name) {
  char peer[64] = "this machine";
  union srv_address a;
  socklen_t len = sizeof a;
  if (c->is_tcp && getpeername(c->io.out, &a.sa, &len) == 0)
    srv_format_address(&a, peer, sizeof peer);
  conn_log(c, NBDSERVE_LOG_INFO, "%d: connected from %s", c->id, peer);
  int err = name ? hs_enter_name(c, name) : hs_run(c);
  if (!err) err = tx_run(c);
  assert(!c->nworkers && (err == CONN_LEFT || err < 0));
  if (srv_must_linger(c, err)) io_linger(&c->io);
  if (err == CONN_LEFT) err = c->send_err; /* or it was cut off: not reading */
  if (c->export && c->export->from_callback) srv_last_flush(c->export);
  if (c->export) ex_release(c->export);
  int is_usual =
      !err || err == -EPIPE || err == -ECONNRESET || err == -ESHUTDOWN;
  conn_log(c, is_usual ? NBDSERVE_LOG_INFO : NBDSERVE_LOG_WARNING,
           "%d: gone: %s", c->id, err ? u_errno_text(err) : "disconnected");
  srv_free_client(c);
  return err == -ESHUTDOWN ? 0 : err;
}

/* The thread of an accepted client. */
static void *srv_thread(void *client) {
  srv_serve_client(client, NULL);
  return NULL;
}

/* See nbdserve.h. */
int nbdserve_serve(struct nbdserve *s, int in, int out, const char *name) {
  struct conn *c = srv_new_client(s, in, out, -1);
  return c ? srv_serve_client(c, name) : -ENOMEM;
}

/* ---- Stopping (S3) ------------------------------------------------------- */

/* Shuts down all clients: SHUT_RD, no more requests are taken, or SHUT_RDWR,
 * nothing is sent any more, either.  Returns their number. */
static unsigned srv_shutdown_clients(struct nbdserve *s, int how) {
  os_lock(&s->lock);
  unsigned n = s->nconns;
  for (struct conn *c = s->conns; c; c = c->next) {
    int looks = c->fd < 0 || (c->is_tcp && how == SHUT_RD); /* at the pipe */
    if (!looks) shutdown(c->fd, how);
  }
  os_unlock(&s->lock);
  return n;
}

/* Steps 1 and 3 to 7 of (S3).  0, or the error of a last flush. */
static int srv_finish(struct nbdserve *s) {
  struct pollfd p = {.fd = s->noticed[0], .events = POLLIN};
  nbdserve_unlisten(s);
  nbdserve_stop(s);
  assert(!s->nlisteners);
  int64_t end = io_grace_end(&s->stop);
  for (;;) {
    int over = os_now_ms() >= end;
    if (!srv_shutdown_clients(s, over ? SHUT_RDWR : SHUT_RD)) break;
    poll(&p, 1, over ? -1 : io_timeout(end)); /* until one has left */
    srv_take_poke(s->noticed[0]);
  }
  s->finished = 1;
  int first = 0;
  for (struct ex *ex = ex_next(s, NULL); ex; ex = ex_next(s, ex)) {
    int err = srv_last_flush(ex);
    if (!first) first = err;
  }
  return first;
}

/* ---- Accepting ----------------------------------------------------------- */

/* What nbdserve_run does in one round. */
struct srv_plan {
  int room;      /* clients that may be accepted */
  int listen;    /* look whether somebody waits */
  int may_exit;  /* if nobody does, nothing is left to do */
  int64_t until; /* in os_now_ms: wait no longer than that */
};

/* Decides how long to wait, and for what. */
static struct srv_plan srv_plan(struct nbdserve *s) {
  const struct nbdserve_config *k = &s->config;
  struct srv_plan plan = {.until = INT64_MAX};
  int64_t now = os_now_ms();
  os_lock(&s->lock);
  if (!s->idle_since) s->idle_since = now; /* nobody has come yet */
  if (!s->nconns && k->idle_exit_ms)
    plan.until = s->idle_since + k->idle_exit_ms;
  if (!s->nconns && s->totals.clients > 0 && (k->flags & NBDSERVE_CONFIG_ONCE))
    plan.until = now;
  plan.room = (int)k->max_conn - (int)s->nconns;
  os_unlock(&s->lock);
  plan.may_exit = plan.until <= now; /* after a last look */
  if (s->accept_after > now) { /* no memory, no descriptors: a little later */
    plan.room = 0;
    if (s->accept_after < plan.until) plan.until = s->accept_after;
    return plan;
  }
  /* When all slots are taken nobody is accepted, but that somebody waits is
   * worth a message now and then. */
  plan.listen = plan.room > 0 || now >= s->tell_full_after;
  return plan;
}

/* Accepts a client and starts its thread.  Returns 1, 0 if nobody was there
 * after all, or -errno if nobody can be served now. */
static int srv_accept(struct nbdserve *s, int listener) {
  int fd = os_accept(listener);
  if (fd == -EAGAIN || fd == -ECONNABORTED || fd == -EINTR) return 0;
  if (fd < 0) return fd;
  struct conn *c = srv_new_client(s, fd, fd, fd);
  if (!c) {
    close(fd);
    return -ENOMEM;
  }
  int err = os_thread(srv_thread, c);
  if (!err) return 1;
  srv_free_client(c); /* closes fd */
  os_lock(&s->lock);
  s->totals.clients--; /* it never was one: see NBDSERVE_CONFIG_ONCE */
  os_unlock(&s->lock);
  return err;
}

/* Pauses accepting, and says so, unless a pause ended a moment ago. */
static void srv_pause_accepting(struct nbdserve *s, int err) {
  int64_t now = os_now_ms();
  if (now - s->accept_after > SRV_PAUSE_MS)
    u_log(&s->config, NBDSERVE_LOG_WARNING, "cannot accept clients now: %s",
          u_errno_text(err));
  s->accept_after = now + SRV_PAUSE_MS;
}

/* Says that somebody waits who cannot be served, if that was not said
 * lately. */
static void srv_tell_full(struct nbdserve *s) {
  int64_t now = os_now_ms();
  if (now < s->tell_full_after) return;
  s->tell_full_after = now + SRV_TELL_FULL_MS;
  u_log(&s->config, NBDSERVE_LOG_WARNING,
        "%" PRIu32 " clients are served, which is the limit; "
        "the next one has to wait",
        s->config.max_conn);
}

/* Accepts from each listener that poll() found ready, beginning behind the one
 * that the last client came from, so that all get their share of the slots.
 * Returns whether somebody was there. */
static int srv_accept_ready(struct nbdserve *s, const struct pollfd *p,
                            int room) {
  int found = 0;
  int first = s->first_listener;
  for (int i = 0; i < s->nlisteners; i++) {
    int which = (int)((unsigned)(first + i) % (unsigned)s->nlisteners);
    if (!p[which].revents) continue;
    found = 1;
    if (room <= 0) {
      srv_tell_full(s);
      break;
    }
    int r = srv_accept(s, s->listeners[which].fd);
    if (r < 0) srv_pause_accepting(s, r);
    if (r > 0) {
      room--;
      s->first_listener = which + 1;
    }
  }
  return found;
}

/* See nbdserve.h.  Rounds of: plan, wait, look at each pipe, accept. */
int nbdserve_run(struct nbdserve *s) {
  struct pollfd p[SRV_OWN_FDS + SRV_LISTENERS + 1] = {
      {.fd = s->stop.pipe[0], .events = POLLIN},
      {.fd = s->wake[0], .events = POLLIN},
      {.fd = s->noticed[0], .events = POLLIN}};
  struct pollfd *l = p + SRV_OWN_FDS; /* the listeners */
  for (;;) {
    struct srv_plan plan = srv_plan(s);
    for (int i = 0; i < s->nlisteners; i++) {
      l[i].fd = plan.listen ? s->listeners[i].fd : -1;
      l[i].events = POLLIN;
      l[i].revents = 0;
    }
    nfds_t n = (nfds_t)(SRV_OWN_FDS + s->nlisteners);
    int r = poll(p, n, io_timeout(plan.until));
    if (r < 0 && errno != EINTR) return -errno;
    if (r < 0) continue;
    if (p[0].revents) return srv_finish(s);
    if (p[1].revents && srv_take_poke(s->wake[0])) return -EINTR;
    if (p[2].revents) srv_take_poke(s->noticed[0]);
    int found = srv_accept_ready(s, l, plan.room);
    if (plan.may_exit && !found) return srv_finish(s);
  }
}

/* See nbdserve.h. */
void nbdserve_free(struct nbdserve *s) {
  if (!s) return;
  if (!s->finished) srv_finish(s); /* nbdserve_run did not come to its end */
  assert(!s->conns && !s->nlisteners);
  while (s->exports) {
    struct ex *ex = s->exports;
    s->exports = ex->next;
    ex_free(ex);
  }
  for (int i = 0; i < 2; i++) { /* -1, if nbdserve_new failed, does no harm */
    close(s->stop.pipe[i]);
    close(s->wake[i]);
    close(s->noticed[i]);
  }
  os_monitor_free(&s->stop.lock);
  os_monitor_free(&s->lock);
  NBDSERVE_FREE(s);
}

/* ==== [13] CLI (cli_) ====================================================
 * The command, on top of nbdserve.h.  What a process has only one of (signals,
 * standard streams, the environment, its end) is touched here, nowhere else.
 *
 * The life of the process: main reads the options.  If the command line is a
 * command on stores, cli_run_verb does it and exits.  Otherwise main opens the
 * targets, then the sockets, tells whoever waits that it is ready, and serves
 * until the end.  However the process ends, by way of exit(), cli_close removes
 * what was made and closes what was opened.  Whoever finds that it makes no
 * sense to go on prints one message and calls exit() at once: cli_die.
 *
 * Threads: the main thread does all this, and no other one takes signals.  The
 * threads of clients come here only for --fault and --delay (cli_before) and to
 * find a volume (cli_find_volume, cli_list_volumes).  A served store has the
 * thread cli_control.  What all of them read, `opt` and most of `cli`, does not
 * change after the server has started.
 *
 * To add a command-line option: a row in CLI_OPTIONS, which says what its value
 * may be.  opt[] has the value then, and --help prints the row.  What the
 * option must not be combined with goes to cli_exclusions.
 *
 * To add a command on stores: a function that does it, and a row in cli_verbs,
 * from which --help prints it, too.
 *
 * To add a kind of target: cli_parse_target, which tells targets apart, and
 * cli_add_target, which opens them. */
#if !NBDSERVE_NO_MAIN
#include <sys/wait.h>

/* Exit status.  A command that is served may have any other one. */
enum {
  CLI_OK = 0,
  CLI_FAILED = 1,      /* a message says why */
  CLI_USAGE = 2,       /* the command line makes no sense */
  CLI_DAMAGED = 3,     /* verify found damage */
  CLI_IN_USE = 4,      /* somebody else has the target */
  CLI_NOT_FOUND = 127, /* as a shell says it: there is no such program */
  CLI_BY_SIGNAL = 128  /* as a shell says it: plus the number of the signal */
};

enum {
  /* Seconds that a command has, from SIGTERM to its end: enough to write what
   * it has left, and no more than whoever has sent the signal will wait. */
  CLI_CHILD_GRACE_S = 10,

  /* A command that takes less time than this shows no progress. */
  CLI_PROGRESS_AFTER_MS = 1000,

  /* How often progress is shown: often enough to look alive */
  CLI_PROGRESS_EVERY_MS = 100,

  /* Socket activation passes this descriptor and the ones that follow it. */
  CLI_FIRST_PASSED_FD = 3,

  /* Said of operands: there may be as many as the system lets through. */
  CLI_ANY_NUMBER = INT_MAX,

  /* The port of NBD, as assigned by IANA */
  CLI_DEFAULT_PORT = 10809
};

/* How far the end has come; see "Signals, and how it ends" below.  It goes from
 * one to the next, and never back. */
enum cli_phase {
  CLI_SERVING,    /* nobody has asked for the end */
  CLI_CHILD_ENDS, /* the command is to end, and is served until it has */
  CLI_STOPPING    /* nbdserve_stop was called */
};

/* The state of the process.  What the options say is in `opt`. */
static struct {
  /* ---- The command line without its options.  It stays where it is, in argv,
   * but is cut at "=" and "::". */

  /* [NAME=]TARGET each, or a command on stores with its operands */
  char **targets;
  int ntargets;
  /* What stands behind "--", ended by NULL; or NULL */
  char **command;

  /* ---- The server, and how it is reached */

  struct nbdserve *server;
  /* The name of the export if there is only one, for the URI; or "" */
  const char *export_name;
  /* The descriptor of a client that is the only one: standard input (and
   * output) with --stdin, or a connected socket that was passed to us.  -1:
   * clients connect, as usual. */
  int client;
  /* "": there is nowhere to connect to, or whoever passed us a socket knows.
   * It has room for the longest name and path, with each byte as %XX. */
  char uri[3 * WIRE_STRING_MAX + 1024];

  /* ---- What has to be removed at exit */

  /* The directory of the private socket, or "".  It has to be short: the path
   * of a socket is limited to about a hundred bytes. */
  char private_dir[100];
  /* The pidfile that we have made, open; 0: we have not. */
  int pidfile;

  /* ---- The store that is served, or that a command is for; one at most */

  /* Its path, or "" */
  char store[PATH_MAX];
  /* The store; NULL: it is not open. */
  struct nbdserve_cas *cas;
  /* The path of the socket that takes commands, STORE.ctl */
  char ctl_path[PATH_MAX];
  /* That socket, listening, or -1; and its file, as we have made it, or all
   * zero */
  int ctl;
  struct stat ctl_st;
  /* A pipe: cli_control writes to it when it ends, for cli_await_control.
   * ctl_ended[0] is 0 if that thread was never started. */
  int ctl_ended[2];

  /* --fork: the pipe to our parent, which waits for a byte; or -1 */
  int ready_pipe;

  /* ---- What the signal handler writes.  Others read it, and write to it only
   * while the signals are blocked.  (The exception is stats_wanted, which is
   * cleared before the totals are printed: a signal that comes in between gets
   * them printed again.) */

  /* SIGUSR1 has come. */
  volatile sig_atomic_t stats_wanted;
  /* SIGTERM, SIGINT or SIGHUP has come. */
  volatile sig_atomic_t end_wanted;
  /* enum cli_phase */
  volatile sig_atomic_t phase;
  /* The process id of the command while it runs; 0: there is none.  As long as
   * this is set the process exists, though it may have ended: nobody else waits
   * for it, so its id cannot become that of another process. */
  volatile sig_atomic_t child;
  /* We have sent SIGTERM to the command. */
  volatile sig_atomic_t child_told;
  /* The exit status of a command that has ended */
  volatile sig_atomic_t child_status;
} cli = {.export_name = "", .client = -1, .ctl = -1, .ready_pipe = -1};

STATIC_ASSERT(a_process_id_fits, sizeof(sig_atomic_t) >= sizeof(pid_t));

/* ---- Messages ----------------------------------------------------------- */

/* Prints a message: a line on standard error, in one write, so that the lines
 * of several threads do not mix.  The form is "OBJECT: what is wrong: reason
 * (what to do)".  What is too long for the buffer is cut; a path fits. */
static void OS_PRINTF(1, 2) cli_say(const char *fmt, ...) {
  char text[PATH_MAX + 600];
  char line[sizeof text + 20];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(text, sizeof text, fmt, ap);
  va_end(ap);
  int n = snprintf(line, sizeof line, "nbdserve: %s\n", text);
  assert(n > 0 && n < (int)sizeof line);
  (void)!write(2, line, (size_t)n); /* if that fails there is nobody to tell */
}

/* The `log` function of the server: it filters by level, so that all that comes
 * here is to be printed. */
static void cli_log(void *unused, int level, const char *message) {
  (void)unused;
  (void)level;
  cli_say("%s", message);
}

/* Prints a message and ends the process, by way of cli_close.  These are macros
 * because only then every compiler knows that they do not return. */
#define cli_die(status, ...) \
  do { \
    cli_say(__VA_ARGS__); \
    exit(status); \
  } while (0)
#define cli_usage(...) cli_die(CLI_USAGE, __VA_ARGS__)
#define cli_failed(...) cli_die(CLI_FAILED, __VA_ARGS__)

/* Ends the process if err is an error (-errno), with a message that names the
 * object.  EBUSY means that a file or store is locked by another server, which
 * has an exit status of its own: scripts try again then. */
static void cli_exit_if_error(int err, const char *object) {
  assert(err <= 0 && object);
  if (!err) return;
  if (err == -EBUSY)
    cli_die(CLI_IN_USE, "%s: %s; another server has it", object,
            u_errno_text(err));
  cli_failed("%s: %s", object, u_errno_text(err));
}

/* ---- Signals, and how it ends --------------------------------------------
 * SIGTERM, SIGINT and SIGHUP ask for the end.  If a command is being served
 * (--run, or what stands behind "--") the end comes in this order:
 *
 *   1. Nobody new can connect: nbdserve_unlisten.  The clients that are there,
 *      the command's above all, are served as before.
 *   2. The command is told, by SIGTERM, and served until it has ended.  It may
 *      still write what it has, and flush.
 *   3. Its end, a second signal or CLI_CHILD_GRACE_S seconds finish step 2:
 *      nbdserve_stop.
 *   4. The server finishes in its own order: see srv_finish in [12].
 *   5. The status of the command becomes ours.  If it has still not ended a
 *      message says so, and it is left alone.
 *
 * Without a command the first signal leads to nbdserve_stop and step 4.  When
 * nbdserve_stop has been called and a signal has come before, SIGINT ends the
 * process at once: whoever types Ctrl-C twice does not want to wait.
 *
 *   CLI_SERVING --- a signal, while a command runs --> CLI_CHILD_ENDS
 *        |                                                    |
 *        | a signal without a command,          its end, a second signal,
 *        | or the end of the command            or SIGALRM: time is over
 *        |                                                    |
 *        +-----------------> CLI_STOPPING <-------------------+
 *
 * Who does what: the signal handler owns cli.phase.  It runs in the main thread
 * (all others block the signals) and interrupts nbdserve_run by nbdserve_wake;
 * cli_run, around nbdserve_run, then does steps 1 and 2: nbdserve_unlisten must
 * not be called by a handler.  Without threads nbdserve_run does not return
 * while it serves a client, so there the handler itself does step 2; step 1 is
 * not urgent, as nobody is accepted meanwhile.  The handler also waits for the
 * command, so that its end reaches nbdserve_stop in that case, too. */

/* Signals that are caught, or ignored while the process ends. */
static const int cli_signals[] = {SIGHUP,  SIGINT,  SIGTERM,
                                  SIGUSR1, SIGCHLD, SIGALRM};

/* Keeps the handler away until the caller restores the mask *was with
 * sigprocmask; signals that have come meanwhile are handled then.  This is the
 * mask of the main thread, which is the only one that takes these signals.
 * (POSIX wants pthread_sigmask for that if there are other threads; no system
 * makes a difference, and without threads there is none.) */
static void cli_block_signals(sigset_t *was) {
  sigset_t all;
  sigfillset(&all);
  sigprocmask(SIG_BLOCK, &all, was);
}

/* Translates what waitpid says into an exit status, as a shell does. */
static int cli_exit_status(int wait_status) {
  assert(WIFSIGNALED(wait_status) || WIFEXITED(wait_status));
  if (WIFSIGNALED(wait_status)) return CLI_BY_SIGNAL + WTERMSIG(wait_status);
  return WEXITSTATUS(wait_status);
}

/* Step 3.  Only the handler calls this: cli.phase is its own. */
static void cli_stop_server(void) {
  assert(cli.server);
  cli.phase = CLI_STOPPING;
  nbdserve_stop(cli.server);
}

/* Step 2: sends SIGTERM to the command, if that was not done yet, and sets the
 * clock that limits its time.  The handler may call this.  The signals are
 * blocked because the command may end at any moment: once the handler has
 * waited for it, its process id may belong to somebody else. */
static void cli_tell_child(void) {
  sigset_t was;
  cli_block_signals(&was);
  if (cli.child && !cli.child_told) {
    assert(cli.child > 0); /* kill would hit a group of processes */
    cli.child_told = 1;
    kill((pid_t)cli.child, SIGTERM);
    alarm(CLI_CHILD_GRACE_S);
  }
  sigprocmask(SIG_SETMASK, &was, NULL);
}

/* SIGCHLD: takes the status of the command if it has ended.  The signal comes
 * for other reasons, too: the command was suspended, or a process has ended
 * that was started by whatever program this process was before exec.  Only the
 * command is waited for, so such children are left alone. */
static void cli_on_child(void) {
  pid_t child = (pid_t)cli.child;
  int wait_status = 0;
  if (!child || waitpid(child, &wait_status, WNOHANG) != child) return;
  cli.child_status = cli_exit_status(wait_status);
  cli.child = 0;
  cli_stop_server();
}

/* SIGTERM, SIGINT or SIGHUP: see the order above.  A SIGINT that the terminal
 * sends goes to the command as well, so it may well have ended already. */
static void cli_on_end(int sig) {
  int is_first = !cli.end_wanted;
  assert(cli.phase != CLI_CHILD_ENDS || cli.child);
  cli.end_wanted = 1;
  if (cli.child && (is_first || !cli.child_told)) {
    cli.phase = CLI_CHILD_ENDS;
    if (NBDSERVE_NO_THREADS) cli_tell_child();
    return;
  }
  if (!is_first && cli.phase == CLI_STOPPING && sig == SIGINT)
    _exit(CLI_BY_SIGNAL + sig);
  cli_stop_server();
}

/* The signal handler.  It calls nothing but what POSIX and nbdserve.h allow in
 * a handler.  All other signals are blocked meanwhile (cli_catch_signals), so
 * that what it does to `cli` is done in one piece.  It may run before there is
 * a command, and after there was one, but never before there is a server.  It
 * always wakes cli_run, which looks at what there is to do. */
static void cli_on_signal(int sig) {
  int saved = errno;
  assert(cli.server);
  if (sig == SIGUSR1)
    cli.stats_wanted = 1;
  else if (sig == SIGCHLD)
    cli_on_child();
  else if (sig != SIGALRM)
    cli_on_end(sig);
  else if (cli.child_told) /* the command has had its time */
    cli_stop_server();
  nbdserve_wake(cli.server);
  errno = saved;
}

/* Gives our signals a handler, or SIG_IGN when the process ends, or SIG_DFL for
 * a program that is to be executed.  SIGHUP and SIGINT stay ignored if whoever
 * started us wants it so, as nohup does, and a shell for what it runs in the
 * background.  SIGPIPE and SIGXFSZ are ignored, so that writing to a closed
 * pipe, or beyond the limit for the size of files, becomes an error; but not
 * for such a program, which inherits what is ignored.  Who started us may have
 * blocked signals, without which we would not learn of a command's end. */
static void cli_catch_signals(void (*handler)(int)) {
  struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
  sigset_t ours;
  sigemptyset(&ours);
  sigfillset(&action.sa_mask);
  for (size_t i = 0; i < COUNT_OF(cli_signals); i++) {
    int sig = cli_signals[i];
    sigaddset(&ours, sig);
    struct sigaction was = {.sa_handler = SIG_DFL};
    if (sig == SIGHUP || sig == SIGINT) sigaction(sig, NULL, &was);
    if (was.sa_handler != SIG_IGN) sigaction(sig, &action, NULL);
  }
  if (handler != SIG_DFL) action.sa_handler = SIG_IGN;
  sigaction(SIGPIPE, &action, NULL);
  sigaction(SIGXFSZ, &action, NULL);
  if (handler == cli_on_signal) sigprocmask(SIG_UNBLOCK, &ours, NULL);
}

/* ---- Files that we make and remove -------------------------------------- */

/* Removes the socket for commands, if it still is ours.  Whoever has put
 * another file in its place keeps that.  We have the socket bound: its inode
 * number would otherwise be free, and the other file may have got it.  As long
 * as we have not made it, ctl_st is all zero and fits no file. */
static void cli_remove_ctl(void) {
  struct stat st;
  if (lstat(cli.ctl_path, &st) == 0 && st.st_dev == cli.ctl_st.st_dev &&
      st.st_ino == cli.ctl_st.st_ino)
    unlink(cli.ctl_path);
}

/* --pidfile: writes our process id to a file, with the mode that the umask asks
 * for.  The file appears in one step, when it is whole: whoever sees it may
 * connect.  Until then it has another name; mkstemp neither follows symbolic
 * links nor opens a file that is there already.  A symbolic link at path is
 * replaced, not followed.  The descriptor stays open, for
 * os_remove_own_file: with it closed, the inode number might become that of
 * another server's pidfile. */
static void cli_write_pidfile(const char *path) {
  char temp[PATH_MAX];
  struct stat st;
  assert(!cli.pidfile);
  if (snprintf(temp, PATH_MAX, "%s.XXXXXX", path) >= PATH_MAX)
    cli_exit_if_error(-ENAMETOOLONG, path);
  if (lstat(path, &st) == 0 && !S_ISREG(st.st_mode) && !S_ISLNK(st.st_mode))
    cli_failed("%s: not a file, so not replaced by the pidfile", path);
  int fd = cli.pidfile = mkstemp(temp);
  if (fd < 0) cli_exit_if_error(-errno, path);
  mode_t mask = umask(077); /* there is no other way to ask for it */
  umask(mask);
  if (dprintf(fd, "%ld\n", (long)getpid()) < 0 ||
      fchmod(fd, 0666 & ~mask) < 0 || fcntl(fd, F_SETFD, FD_CLOEXEC) < 0 ||
      rename(temp, path) < 0) {
    int err = -errno;
    unlink(temp);
    cli_exit_if_error(err, path);
  }
}

/* ---- Words, and what --fault and --delay do to requests ----------------- */

/* A word that the value of an option may contain, and what it stands for.  In a
 * table of words the last name is NULL. */
struct cli_word {
  const char *name;
  uint32_t value;
};

enum {
  /* The types of requests are below this; NBD_CMD_BLOCK_STATUS is the last. */
  CLI_NTYPES = NBD_CMD_BLOCK_STATUS + 1,
  /* In place of a type: each of them */
  CLI_ALL_TYPES = CLI_NTYPES
};

/* clang-format off */

/* The words are lists of macros, because they are needed twice: in a table, as
 * rows, and in the message that says which ones are allowed, as text. */
#define CLI_ROW(name, value) {name, value},
#define CLI_TEXT(name, value) " " name

/* --without: bits of nbdserve_config.without, where flags of the transmission
 * stand for themselves, and option N of the handshake for bit 16 + N */
#define CLI_FEATURES(X) \
  X("flush", NBD_FLAG_SEND_FLUSH)     X("fua", NBD_FLAG_SEND_FUA) \
  X("trim", NBD_FLAG_SEND_TRIM)       X("zero", NBD_FLAG_SEND_WRITE_ZEROES) \
  X("df", NBD_FLAG_SEND_DF)           X("multi-conn", NBD_FLAG_CAN_MULTI_CONN) \
  X("cache", NBD_FLAG_SEND_CACHE)     X("fast-zero", NBD_FLAG_SEND_FAST_ZERO) \
  X("list", 65536u << NBD_OPT_LIST)   X("info", 65536u << NBD_OPT_INFO) \
  X("go", 65536u << NBD_OPT_GO) \
  X("structured", 65536u << NBD_OPT_STRUCTURED_REPLY) \
  X("list-meta", 65536u << NBD_OPT_LIST_META_CONTEXT) \
  X("meta", 65536u << NBD_OPT_SET_META_CONTEXT) \
  X("extended", 65536u << NBD_OPT_EXTENDED_HEADERS)

/* --fault and --delay: the requests that they concern */
#define CLI_TYPES(X) \
  X("read", NBD_CMD_READ)             X("write", NBD_CMD_WRITE) \
  X("flush", NBD_CMD_FLUSH)           X("trim", NBD_CMD_TRIM) \
  X("cache", NBD_CMD_CACHE)           X("zero", NBD_CMD_WRITE_ZEROES) \
  X("status", NBD_CMD_BLOCK_STATUS)   X("all", CLI_ALL_TYPES)

/* --fault: the errors that the protocol knows, as errno values */
#define CLI_ERRORS(X) \
  X("EPERM", EPERM)                   X("EIO", EIO) \
  X("ENOMEM", ENOMEM)                 X("EINVAL", EINVAL) \
  X("ENOSPC", ENOSPC)                 X("EOVERFLOW", EOVERFLOW) \
  X("ENOTSUP", ENOTSUP)               X("ESHUTDOWN", ESHUTDOWN)

static const struct cli_word cli_features[] = {CLI_FEATURES(CLI_ROW) {0}};
static const struct cli_word cli_types[] = {CLI_TYPES(CLI_ROW) {0}};
static const struct cli_word cli_errors[] = {CLI_ERRORS(CLI_ROW) {0}};

/* --cache: flags of an export */
static const struct cli_word cli_cache_modes[] = {
    {"writeback", 0},                       {"unsafe", NBDSERVE_EXPORT_UNSAFE},
    {"writethrough", NBDSERVE_EXPORT_WRITETHROUGH}, {0}};

/* clang-format on */

/* What --fault and --delay do to the requests of a type.  This is fixed before
 * the server is made, except for `sum`, which server->lock guards. */
static struct cli_fault {
  /* The answer to requests that fail, -errno */
  int err;
  /* How many of a million requests fail */
  unsigned rate_ppm;
  /* Each request adds rate_ppm; where that makes a million the request fails,
   * and the million is taken off. */
  unsigned sum;
  /* How long each request waits before it is done */
  int delay_ms;
} cli_faults[CLI_NTYPES];

/* The `before` function of the server: it is called for each request, in the
 * thread that is about to do it, and may wait there.  Which requests fail is
 * not left to chance: tests can rely on the number. */
static int cli_before(void *unused, unsigned type, uint64_t off, uint64_t len) {
  (void)unused;
  (void)off;
  (void)len;
  assert(type < CLI_NTYPES);
  struct cli_fault *fault = &cli_faults[type];
  if (fault->delay_ms) poll(NULL, 0, fault->delay_ms);
  os_lock(&cli.server->lock);
  fault->sum += fault->rate_ppm;
  int fails = fault->sum >= 1000000;
  if (fails) fault->sum -= 1000000;
  assert(fault->sum < 1000000);
  os_unlock(&cli.server->lock);
  return fails ? fault->err : 0;
}

/* Takes a word off the front of *text.  The word goes to the first of the
 * characters in `ends`, which is taken off, too, or to the end of the text.
 * Returns false if the table has no such word. */
static int cli_take_word(const struct cli_word *words, const char **text,
                         const char *ends, uint32_t *value) {
  size_t len = strcspn(*text, ends);
  assert(words->name);
  while (words->name && (strncmp(words->name, *text, len) || words->name[len]))
    words++;
  *value = words->value;
  *text += len;
  if (**text) ++*text;
  return words->name != NULL;
}

/* ---- Options ------------------------------------------------------------ */

/* clang-format off */

/* The options, in the order of --help: the name behind OPT_, the name on the
 * command line, and members of struct cli_option.  This is a list of macros, so
 * that it says all about an option in one place. */
#define CLI_OPTIONS(X) \
  X(UNIX, "unix", .letter = 'U', .argument = "PATH", \
    .help = "listen on a unix socket (default: a private one)") \
  X(PORT, "port", .letter = 'p', .argument = "N", .max = 65535, \
    .help = "listen on TCP (usual: 10809; 0: any free port)") \
  X(BIND, "bind", .letter = 'i', .argument = "ADDR", \
    .help = "TCP address (default: the two of loopback)") \
  X(STDIN, "stdin", .letter = 's', \
    .help = "serve one client on standard input and output") \
  X(FD, "fd", .argument = "N", .max = INT_MAX, .parse = cli_parse_fd, \
    .form = "the number of a descriptor that is open", \
    .help = "serve descriptor N, a listening or connected socket") \
  X(READ_ONLY, "read-only", .letter = 'r', .help = "refuse writes") \
  X(EXPORT, "export", .letter = 'e', .argument = "NAME", \
    .help = "name of the export (default: every name will do)") \
  X(DESCRIPTION, "description", .letter = 'D', .argument = "TEXT", \
    .help = "shown to clients that list the exports") \
  X(OFFSET, "offset", .letter = 'o', .argument = "N", \
    .max = INT64_MAX, .help = "serve the target from byte N on") \
  X(SIZE, "size", .argument = "N", .min = 1, .max = INT64_MAX, \
    .help = "serve only N bytes of the target") \
  X(BLOCK_SIZE, "block-size", .letter = 'b', .argument = "SIZES", \
    .parse = cli_parse_sizes, .form = "MIN:PREFERRED:MAX, three sizes", \
    .help = "MIN:PREFERRED:MAX (1:4096:32M)") \
  X(CREATE, "create", .argument = "SIZE", .min = 1, .max = INT64_MAX, \
    .help = "make the target, a sparse file, if it is missing") \
  X(TEMPORARY, "temporary", .letter = 'T', \
    .help = "discard at exit what clients have written") \
  X(CACHE, "cache", .argument = "MODE", .parse = cli_parse_cache, \
    .form = "writeback, writethrough or unsafe", \
    .help = "writeback (default), writethrough or unsafe") \
  X(THREADS, "threads", .letter = 't', .argument = "N", .min = 1, \
    .max = 1024, .help = "slow requests of a client done at a time (16)") \
  X(MAX_CONN, "max-conn", .letter = 'm', .argument = "N", \
    .min = 1, .max = SRV_MAX_CONN, .help = "clients served at a time (128)") \
  X(STALL, "stall", .argument = "SEC", .min = 1, .max = 4000000, \
    .help = "disconnect a client stalled in a request (120)") \
  X(ONCE, "once", .letter = '1', .help = "exit when the last client has left") \
  X(IDLE_EXIT, "idle-exit", .argument = "SEC", .min = 1, \
    .max = 4000000, .help = "exit after SEC seconds without a client") \
  X(RUN, "run", .argument = "CMD", \
    .help = "serve while a shell command runs ($uri, $nbd)") \
  X(FORK, "fork", .help = "go into the background once it listens") \
  X(PIDFILE, "pidfile", .letter = 'P', .argument = "FILE", \
    .help = "write the process id to FILE once it listens") \
  X(READY_FD, "ready-fd", .parse = cli_parse_fd, .min = 3, .max = INT_MAX, \
    .form = "the number of a descriptor (3 or above) that is open", \
    .argument = "N", .help = "write the URI to descriptor N once it listens") \
  X(QUIET, "quiet", .letter = 'q', .help = "print errors only") \
  X(VERBOSE, "verbose", .letter = 'v', \
    .help = "log clients; given twice: every request") \
  X(STATS, "stats", .help = "print totals at exit (on SIGUSR1 always)") \
  X(JSON, "json", .help = "print totals, or a command's output, as JSON") \
  X(WITHOUT, "without", .argument = "LIST", .parse = cli_parse_features, \
    .form = "a list of:" CLI_FEATURES(CLI_TEXT) " (with commas)", \
    .help = "hide features from clients (see README)") \
  X(FAULT, "fault", .argument = "CMD:ERR:RATE", .parse = cli_parse_fault, \
    .form = "CMD:ERR:RATE; CMD:" CLI_TYPES(CLI_TEXT) \
            "; ERR:" CLI_ERRORS(CLI_TEXT) "; RATE: 0 to 1", \
    .help = "make requests fail: write:EIO:0.1 (see README)") \
  X(DELAY, "delay", .argument = "CMD:MS", .parse = cli_parse_fault, \
    .form = "CMD:MS; CMD:" CLI_TYPES(CLI_TEXT) "; MS: 0 to 1000000", \
    .help = "make requests wait: read:50 (see README)") \
  X(DRY_RUN, "dry-run", .letter = 'n', \
    .help = "rollback, resize, rm: only check if they can be done") \
  X(NO_VERIFY, "no-verify", \
    .help = "do not check the blocks of a store when reading") \
  X(VERSION, "version", .letter = 'V', \
    .help = "print the version and what it was built with") \
  X(HELP, "help", .letter = 'h', .help = "print this text")

#define CLI_OPTION_ID(id, ...) OPT_##id,
#define CLI_OPTION_ROW(id, text, ...) [OPT_##id] = {.name = text, __VA_ARGS__},

/* OPT_NONE is no option, and never given. */
enum cli_option_id { OPT_NONE, CLI_OPTIONS(CLI_OPTION_ID) OPT_COUNT };

/* clang-format on */

/* What the options say: opt[OPT_PORT].number.  What was not given is 0 or NULL,
 * which is the default for nbdserve.h as well; where 0 is a value of its own (a
 * port, a descriptor) `given` tells the difference.  Nobody changes this after
 * cli_parse. */
static struct {
  /* How often the option was given.  A command behind "--" counts as --run. */
  unsigned given;
  /* The value as it was written; it stays in argv. */
  const char *text;
  /* The value of an option that takes a number */
  uint64_t number;
} opt[OPT_COUNT];

/* What all exports have in common: the sizes and flags that --block-size and
 * --cache say */
static struct nbdserve_export cli_common;

/* What --without says: bits of nbdserve_config.without */
static uint32_t cli_without;

struct cli_option {
  /* What stands behind "--" */
  const char *name;
  /* What stands behind "-"; 0: there is no short form. */
  char letter;
  /* What --help calls the value; NULL: the option takes none. */
  const char *argument;
  const char *help;
  /* The range of an option that takes a number; max is 0: it takes none. */
  uint64_t min;
  uint64_t max;
  /* Takes a value of another kind, or checks what else a number must be.
   * Returns false if the value is not allowed.  NULL: any will do. */
  int (*parse)(enum cli_option_id id, const char *value);
  /* What is allowed, for the message that refuses a value; NULL: the numbers of
   * the range. */
  const char *form;
};

/* ---- A parser for each kind of value ---- */

/* A descriptor that whoever started us has opened.  It has to be open: a number
 * that is free would later be that of a file of our own, maybe of an image. */
static int cli_parse_fd(enum cli_option_id id, const char *value) {
  (void)value;
  assert(opt[id].number <= INT_MAX);
  return fcntl((int)opt[id].number, F_GETFD) >= 0;
}

/* --block-size: three sizes.  Whether they go together is for nbdserve_add to
 * say. */
static int cli_parse_sizes(enum cli_option_id id, const char *value) {
  (void)id;
  uint32_t *const sizes[] = {&cli_common.min_block, &cli_common.preferred_block,
                             &cli_common.max_request};
  for (int i = 0; i < 3; i++) {
    uint64_t size = 0;
    value = u_parse_size(value, &size);
    if (!value || *value != (i < 2 ? ':' : '\0')) return 0;
    if (size < 1 || size > UINT32_MAX) return 0;
    *sizes[i] = (uint32_t)size;
    value++;
  }
  return 1;
}

/* --cache: one of a few words */
static int cli_parse_cache(enum cli_option_id id, const char *value) {
  (void)id;
  return cli_take_word(cli_cache_modes, &value, "", &cli_common.flags);
}

/* --without: a list of words, with commas between them.  Given again it adds to
 * the list. */
static int cli_parse_features(enum cli_option_id id, const char *value) {
  (void)id;
  uint32_t bit;
  while (*value) {
    if (!cli_take_word(cli_features, &value, ",", &bit)) return 0;
    cli_without |= bit;
  }
  return 1;
}

/* --fault: which requests fail, how, and at what rate; --delay: which requests
 * wait, and how many milliseconds.  The number may have a decimal point, and is
 * rounded up: of what is above 0 something happens some time.  NaN is refused,
 * as it fails the comparisons. */
static int cli_parse_fault(enum cli_option_id id, const char *value) {
  int is_fault = id == OPT_FAULT;
  assert(is_fault || id == OPT_DELAY);
  uint32_t command;
  uint32_t error = 0;
  char *rest;
  if (!cli_take_word(cli_types, &value, ":", &command)) return 0;
  if (is_fault && !cli_take_word(cli_errors, &value, ":", &error)) return 0;
  double number = strtod(value, &rest);
  if (rest == value || *rest) return 0;
  if (!(number >= 0 && number <= (is_fault ? 1 : 1e6))) return 0;
  for (uint32_t i = 0; i < CLI_NTYPES; i++) {
    if (command != i && command != CLI_ALL_TYPES) continue;
    if (is_fault) {
      cli_faults[i].err = -(int)error;
      cli_faults[i].rate_ppm = (unsigned)(number * 1e6 + .999);
    } else {
      cli_faults[i].delay_ms = (int)(number + .999);
    }
  }
  return 1;
}

/* ---- The tables ---- */

/* clang-format off */
static const struct cli_option cli_options[OPT_COUNT] = {
    CLI_OPTIONS(CLI_OPTION_ROW)};

/* Options that exclude others, and why */
static const struct {
  enum cli_option_id option;
  enum cli_option_id others[3];
  const char *reason;
} cli_exclusions[] = {
    {OPT_STDIN, {OPT_UNIX, OPT_PORT, OPT_BIND}, "with --stdin nobody listens"},
    {OPT_STDIN, {OPT_FD}, "both name the client"},
    {OPT_STDIN, {OPT_FORK}, "the background has no standard input"},
    {OPT_FD, {OPT_UNIX, OPT_PORT, OPT_BIND}, "the socket is there already"},
    {OPT_RUN, {OPT_STDIN}, "the command could not connect"},
    {OPT_RUN, {OPT_FD}, "the command would have no URI"},
    {OPT_RUN, {OPT_FORK}, "nobody would wait for the command"},
    {OPT_RUN, {OPT_ONCE, OPT_IDLE_EXIT}, "it ends with the command"},
    {OPT_CREATE, {OPT_READ_ONLY}, "a new target would stay empty"},
    {OPT_TEMPORARY, {OPT_READ_ONLY}, "there would be nothing to discard"},
    {OPT_TEMPORARY, {OPT_CREATE}, "the target is only read"}};
/* clang-format on */

/* ---- From argv to `opt` ---- */

/* Takes an option that stands in *word.  The value is what stands behind it in
 * the same word, or NULL; if the option needs one it then is the next word.
 * (Behind the last word of argv there is NULL.)  Returns the last word used.  A
 * value that is not allowed ends the process. */
static char **cli_take_option(enum cli_option_id id, char **word,
                              const char *value) {
  const struct cli_option *option = &cli_options[id];
  if (id == OPT_NONE) cli_usage("%s: unknown option (try --help)", *word);
  assert(option->name && option->help && option->min <= option->max);
  assert(option->argument || (!option->max && !option->parse));
  if (option->argument && !value) value = *++word;
  if (option->argument && !value)
    cli_usage("--%s takes %s", option->name, option->argument);
  if (!option->argument && value)
    cli_usage("--%s takes no value", option->name);
  opt[id].given++;
  opt[id].text = value;
  uint64_t *number = &opt[id].number;
  int is_good = !option->max || (u_parse_number(value, option->max, number) &&
                                 *number >= option->min);
  if (is_good && option->parse) is_good = option->parse(id, value);
  if (!is_good && option->form)
    cli_usage("--%s %s: not %s", option->name, value, option->form);
  if (!is_good)
    cli_usage("--%s %s: not a number from %" PRIu64 " to %" PRIu64,
              option->name, value, option->min, option->max);
  return word;
}

/* Parses the word at *word, which is --NAME or --NAME=VALUE, and the word
 * behind it if that is the value.  Returns the last word that it has used.
 * Names have to be written in full: a shorthand that is unique today would not
 * be so for ever. */
static char **cli_parse_long(char **word) {
  const char *name = *word + 2;
  size_t len = strcspn(name, "=");
  enum cli_option_id id = OPT_COUNT - 1;
  while (id > OPT_NONE && (strlen(cli_options[id].name) != len ||
                           memcmp(cli_options[id].name, name, len) != 0))
    id--;
  return cli_take_option(id, word, name[len] ? name + len + 1 : NULL);
}

/* Does the same for a word of one or more letters behind "-".  The first letter
 * that takes a value ends it: the value is the rest of the word or, if there is
 * no rest, the word behind it. */
static char **cli_parse_short(char **word) {
  for (const char *letter = *word + 1; *letter; letter++) {
    enum cli_option_id id = OPT_COUNT - 1;
    while (id > OPT_NONE && cli_options[id].letter != *letter)
      id--;
    int takes_value = cli_options[id].argument != NULL;
    const char *rest = takes_value && letter[1] ? letter + 1 : NULL;
    char **last = cli_take_option(id, word, rest);
    if (takes_value) return last;
  }
  return word;
}

/* Parses the command line.  Targets may stand between options.  They are
 * gathered at the front of argv, over words that have been parsed: there is at
 * least one such word, the name of the program, so they never reach one that
 * has not. */
static void cli_parse(char **argv) {
  cli.targets = argv;
  for (char **word = argv + 1; *word; word++) {
    const char *text = *word;
    assert(cli.targets + cli.ntargets < word);
    if (text[0] != '-' || !text[1]) {
      cli.targets[cli.ntargets++] = *word;
    } else if (strcmp(text, "--") == 0) {
      opt[OPT_RUN].given++;
      cli.command = word + 1;
      break;
    } else if (text[1] == '-') {
      word = cli_parse_long(word);
    } else {
      word = cli_parse_short(word);
    }
  }
}

/* Refuses what makes no sense for a server.  Commands on stores come before
 * that and just ignore options that are not for them. */
static void cli_check_options(void) {
  for (size_t i = 0; i < COUNT_OF(cli_exclusions); i++) {
    enum cli_option_id a = cli_exclusions[i].option;
    const char *name = cli_options[a].name;
    if (a == OPT_RUN && cli.command) name = " CMD";
    for (size_t j = 0; j < COUNT_OF(cli_exclusions[i].others); j++) {
      enum cli_option_id b = cli_exclusions[i].others[j];
      if (opt[a].given && opt[b].given)
        cli_usage("--%s: not together with --%s: %s", name, cli_options[b].name,
                  cli_exclusions[i].reason);
    }
  }
  if (cli.command && opt[OPT_RUN].text)
    cli_usage("--run: not together with -- CMD: both name the command");
  if (cli.command && !*cli.command) cli_usage("--: no command behind it");
  if (!cli.ntargets) cli_usage("no target (try --help)");
  if (opt[OPT_EXPORT].text && cli.ntargets > 1)
    cli_usage("--export: for a single target (use NAME=TARGET)");
}

/* ---- Commands on stores ----------------------------------------------------
 * A store can be open in one process only, and that process does the command.
 * Usually it is us: the store is opened, the command done, and that is all.  If
 * opening it fails with EBUSY it is being served, and the server does it:
 *
 *   us                        the server's thread cli_control
 *   connect to STORE.ctl  ->  accepts
 *   struct cli_request,
 *   two descriptors       ->  cli_run_job, with its output and its messages
 *                             going straight to these descriptors
 *   exit with the status  <-  a byte: the exit status
 *
 * The descriptors are where the output goes (or the FILE of import and export,
 * which only we may be allowed to open) and our standard error.  If we are gone
 * before the command is done, the server sees that and ends it (cli_progress).
 * Both are processes of one machine and one version of nbdserve, so the request
 * is sent as it lies in memory.  STORE.ctl belongs to the owner of the store
 * and is nobody else's to connect to.
 *
 * The server does one command at a time; the next one waits in the backlog of
 * the socket.  Built without threads it takes no commands. */
#if !NBDSERVE_NO_CAS

enum cli_verb_flags {
  /* It changes nothing in the store, which is opened next to other readers. */
  VERB_READS_ONLY = 1 << 0,
  /* It knows --dry-run.  The others refuse that option: they would change the
   * store all the same. */
  VERB_DRY_RUN = 1 << 1,
  /* Its last operand is a size. */
  VERB_SIZE = 1 << 2,
  /* It may take long and leaves nothing half done when a signal ends it. */
  VERB_IS_LONG = 1 << 3,
  /* Its last operand is a FILE that it reads. */
  VERB_READS_FILE = 1 << 4,
  /* Its last operand is a FILE that it writes; "-" is standard output. */
  VERB_WRITES_FILE = 1 << 5,
  /* It prints any number of rows, as JSON: an array of objects.  The others
   * print one row or none, as JSON: an object. */
  VERB_ROWS = 1 << 6,
  /* It prints a line for each value of its row, with the name in front. */
  VERB_LINES = 1 << 7
};

struct cli_job;

struct cli_verb {
  const char *name;
  /* The operands, as --help and the usage message print them */
  const char *operands;
  const char *help;
  /* VERB_READS_ONLY... */
  unsigned flags;
  /* How many operands it needs besides STORE.  Of two the first one is
   * request.name and the second one request.to; a single one is
   * request.name. */
  int noperands;
  /* How many more it may get.  CLI_ANY_NUMBER: it is done for each of them, in
   * the place of the last one that it needs. */
  int nmore;
  /* For cli_do_change: NBDSERVE_CAS_CREATE... */
  int change;
  /* What -EINVAL means, for the message; NULL: see cli_job_reason. */
  const char *invalid;
  /* Does the command on an open store.  Returns 0 or -errno.  Only `init` has
   * none, as there is no store yet: see cli_init. */
  int (*run)(struct cli_job *job, struct nbdserve_cas *cas);
};

/* What goes over the control socket.  The receiver believes nothing of it: the
 * number of the command is checked, and the texts are ended by NUL. */
struct cli_request {
  /* The operand that is a size; 0: it has none. */
  uint64_t size;
  /* The command: an index of cli_verbs */
  unsigned char verb;
  /* --json and --dry-run */
  unsigned char json;
  unsigned char dry_run;
  /* The operands, or "" */
  char name[PATH_MAX];
  char to[PATH_MAX];
};

/* Where a command writes to */
struct cli_fds {
  /* Rows.  For import and export: the FILE. */
  int output;
  /* Messages and progress */
  int messages;
};

/* A command while it is being done, by whichever process */
struct cli_job {
  /* ---- What is to be done; fixed */
  const struct cli_verb *verb;
  struct cli_request request;
  struct cli_fds fds;
  /* The connection of whoever waits for it, in the server; or -1 */
  int client;

  /* ---- Its output and progress so far; times are in os_now_ms */
  unsigned nrows;
  /* -errno, if something could not be printed */
  int lost;
  int64_t begun_ms;
  /* When progress was last shown; 0: none is on the screen. */
  int64_t shown_ms;
};

/* ---- Progress ----------------------------------------------------------- */

/* Clears the line that shows the progress, if there is one, so that a row or a
 * message can take its place. */
static void cli_hide_progress(struct cli_job *job) {
  if (!job->shown_ms) return;
  dprintf(job->fds.messages, "\r%60s\r", "");
  job->shown_ms = 0;
}

/* Is called now and then by what takes long: a nbdserve_progress_fn.  If it is
 * time, shows on a terminal how much is done; how long the rest takes is
 * guessed from the average so far.  Returns true if the command has to end: a
 * signal has come, or the client that waits for it has gone. */
static int cli_progress(void *arg, uint64_t done, uint64_t total) {
  struct cli_job *job = arg;
  struct pollfd p[] = {{cli.server->stop.pipe[0], POLLIN, 0},
                       {job->client, POLLIN, 0}}; /* -1 is skipped */
  int64_t now = os_now_ms();
  int64_t passed = now - job->begun_ms;
  if (done && passed > CLI_PROGRESS_AFTER_MS &&
      now - job->shown_ms > CLI_PROGRESS_EVERY_MS &&
      isatty(job->fds.messages)) {
    double s = (double)passed / 1000;
    double mib = (double)done / (1 << 20);
    double ratio = (double)done / (double)total;
    dprintf(job->fds.messages, "\r%3.0f%% %8.0f MiB %8.1f MiB/s %6.0f s left",
            ratio * 100, mib, mib / s, s / ratio - s);
    job->shown_ms = now;
  }
  return poll(p, 2, 0) > 0;
}

/* ---- Rows --------------------------------------------------------------- */

/* Prints to the output of a job, and remembers if that fails: whoever reads a
 * list must not take the half of it for the whole. */
static void OS_PRINTF(2, 3)
    cli_print(struct cli_job *job, const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  if (vdprintf(job->fds.output, fmt, ap) < 0) job->lost = -errno;
  va_end(ap);
}

/* A value in a row */
struct cli_value {
  const char *name;
  /* NULL: the value is a number. */
  const char *text;
  uint64_t number;
};

/* clang-format off */
#define CLI_STRING(name_, text_) {.name = name_, .text = text_}
#define CLI_NUMBER(name_, number_) {.name = name_, .number = number_}
/* clang-format on */

/* Prints a row of such values. */
#define CLI_PRINT_ROW(job, ...) \
  cli_print_row(job, (const struct cli_value[]){__VA_ARGS__, {.name = NULL}})

/* Prints a row of values, which end with one that has no name.  On a terminal
 * they are aligned; the first column is wide, as it has the name wherever there
 * is one.  JSON would want nothing in a text escaped: the store refuses names
 * with such characters, and the other texts are our own.  Returns 0, or -errno
 * if some of the output was lost, which ends a list early. */
static int cli_print_row(struct cli_job *job, const struct cli_value *values) {
  unsigned flags = job->verb->flags;
  int json = job->request.json;
  int is_table = !json && !(flags & VERB_LINES);
  int is_aligned = is_table && isatty(job->fds.output);
  const char *quote = json ? "\"" : "";
  assert(values->name && (flags & VERB_ROWS || !job->nrows));
  cli_hide_progress(job);
  if (json && flags & VERB_ROWS) cli_print(job, job->nrows ? "," : "[");
  job->nrows++;
  for (int i = 0; values[i].name; i++) {
    if (json)
      cli_print(job, "%s\"%s\":", i ? "," : "{", values[i].name);
    else if (!is_table)
      cli_print(job, "%s%s\t", i ? "\n" : "", values[i].name);
    else if (i)
      cli_print(job, is_aligned ? "  " : "\t");
    if (values[i].text)
      cli_print(job, "%s%-*s%s", quote, is_aligned && !i ? 40 : 0,
                values[i].text, quote);
    else
      cli_print(job, "%*" PRIu64, is_aligned ? 16 : 0, values[i].number);
  }
  cli_print(job, json ? "}\n" : "\n");
  return job->lost;
}

/* ---- What each command does --------------------------------------------- */

/* create, snapshot, rollback, clone, rename, resize, rm: they change the
 * catalog, and nbdserve.h has one call for all of them. */
static int cli_do_change(struct cli_job *job, struct nbdserve_cas *cas) {
  const struct cli_request *request = &job->request;
  int dry_run = request->dry_run ? NBDSERVE_CAS_DRY_RUN : 0;
  assert(job->verb->change);
  return nbdserve_cas_change(cas, job->verb->change | dry_run, request->name,
                             request->to, request->size);
}

/* Prints a volume or snapshot: a nbdserve_list_fn.  The time comes from a file
 * that anybody may have made: it may lie behind all years. */
static int cli_list_row(void *arg, const struct nbdserve_cas_info *info) {
  time_t created = (time_t)info->created;
  char text[40];
  struct tm tm;
  if (!gmtime_r(&created, &tm)) tm = (struct tm){.tm_mday = 1};
  strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &tm);
  return CLI_PRINT_ROW(arg, CLI_STRING("name", info->name),
                       CLI_NUMBER("size", info->size),
                       CLI_STRING("created", text), CLI_STRING("id", info->id));
}

/* list: a row for each volume and snapshot */
static int cli_do_list(struct cli_job *job, struct nbdserve_cas *cas) {
  return nbdserve_cas_list(cas, cli_list_row, job);
}

/* seal: gives a snapshot its id and prints that.  Until it was sealed all of it
 * has to be read, which takes long. */
static int cli_do_seal(struct cli_job *job, struct nbdserve_cas *cas) {
  char id[72];
  int err = nbdserve_cas_seal(cas, job->request.name, id, cli_progress, job);
  if (err) return err;
  assert(strncmp(id, "sha256-", 7) == 0);
  return CLI_PRINT_ROW(job, CLI_STRING("id", id));
}

/* Prints a range that differs: a nbdserve_range_fn */
static int cli_range_row(void *arg, uint64_t off, uint64_t len) {
  return CLI_PRINT_ROW(arg, CLI_NUMBER("offset", off),
                       CLI_NUMBER("length", len));
}

/* diff: a row for each range in which two volumes or snapshots differ */
static int cli_do_diff(struct cli_job *job, struct nbdserve_cas *cas) {
  return nbdserve_cas_diff(cas, job->request.name, job->request.to,
                           cli_range_row, job);
}

/* Prints what is damaged: a nbdserve_damage_fn.  Damage to the store itself has
 * no name; a row then has "-" there, so that it always has four fields.  What
 * cannot be printed shows in job->lost: there is no way to end this early. */
static void cli_damage_row(void *arg, const char *name, uint64_t off,
                           uint64_t len, const char *why) {
  struct cli_job *job = arg;
  if (!*name && !job->request.json) name = "-";
  CLI_PRINT_ROW(job, CLI_STRING("name", name), CLI_NUMBER("offset", off),
                CLI_NUMBER("length", len), CLI_STRING("why", why));
}

/* verify: a row for each range that is damaged; the exit status tells, too. */
static int cli_do_verify(struct cli_job *job, struct nbdserve_cas *cas) {
  return nbdserve_cas_verify(cas, cli_damage_row, cli_progress, job);
}

/* gc: gives unused space to the file system.  The row has the bytes of the file
 * that nothing uses. */
static int cli_do_gc(struct cli_job *job, struct nbdserve_cas *cas) {
  uint64_t bytes;
  int err = nbdserve_cas_gc(cas, &bytes, cli_progress, job);
  if (err) return err;
  return CLI_PRINT_ROW(job, CLI_NUMBER("bytes", bytes));
}

/* stat: how much is stored, and how full the log is */
static int cli_do_stat(struct cli_job *job, struct nbdserve_cas *cas) {
  struct nbdserve_cas_stat stat;
  nbdserve_cas_stat(cas, &stat);
  assert(u_is_power_of_2(stat.block_size));
  return CLI_PRINT_ROW(
      job, CLI_NUMBER("block_size", stat.block_size),
      CLI_NUMBER("stored", stat.stored), CLI_NUMBER("free", stat.free),
      CLI_NUMBER("file", stat.file), CLI_NUMBER("log", stat.log));
}

/* What import and export move at a time: a whole number of blocks of every size
 * that a store may have.  A process does one command at a time, in the main
 * thread or in cli_control, so one buffer is enough. */
static unsigned char cli_buffer[65536];

/* How import and export move the bytes of a volume */
enum cli_copy {
  /* From a file to the volume.  Zeroes need no care: the store knows them. */
  COPY_IN,
  /* To a pipe, a terminal, or wherever standard output may lead */
  COPY_OUT,
  /* To a file that gets the size of the volume first.  It is one hole then:
   * zeroes need not be written.  A file that cannot be cut, a block device or a
   * pipe, is written from the front like standard output. */
  COPY_TO_FILE
};

/* Writes the first n bytes of the buffer, in as many steps as it takes. */
static int cli_write_buffer(int fd, uint64_t n) {
  assert(n <= sizeof cli_buffer);
  for (uint64_t done = 0; done < n;) {
    ssize_t r = write(fd, cli_buffer + done, (size_t)(n - done));
    if (r <= 0) return r < 0 ? -errno : -EIO;
    done += (uint64_t)r;
  }
  return 0;
}

/* Copies n bytes of a volume at off, as many as fit into the buffer. */
static int cli_copy_piece(int file, const struct nbdserve_export *ex,
                          enum cli_copy kind, uint64_t off, uint64_t n) {
  struct iovec piece = {cli_buffer, (size_t)n};
  assert(n > 0 && n <= sizeof cli_buffer);
  assert(off < ex->size && n <= ex->size - off);
  if (kind == COPY_IN) {
    int err = os_transfer(file, OS_READ, &piece, 1, off);
    return err ? err : ex->ops->write(ex->ctx, cli_buffer, off, n, 0);
  }
  int err = ex->ops->read(ex->ctx, cli_buffer, off, n, 0);
  if (err) return err;
  if (kind == COPY_OUT) return cli_write_buffer(file, n);
  if (u_is_zero(cli_buffer, (size_t)n)) return 0;
  return os_transfer(file, OS_WRITE, &piece, 1, off);
}

/* export: writes a volume or snapshot to a FILE, which gets its size, or to
 * standard output, behind what may be there already.  import: the other way, to
 * a new volume.  Makes durable what it has written, except to a pipe. */
static int cli_do_copy(struct cli_job *job, struct nbdserve_cas *cas) {
  struct nbdserve_export ex = {.name = NULL};
  int file = job->fds.output;
  enum cli_copy kind = job->verb->flags & VERB_READS_FILE ? COPY_IN : COPY_OUT;
  int err = nbdserve_cas_volume(cas, job->request.name, &ex);
  if (err) return err;
  if (kind == COPY_OUT && strcmp(job->request.to, "-") != 0 &&
      ftruncate(file, 0) == 0 && ftruncate(file, (off_t)ex.size) == 0)
    kind = COPY_TO_FILE;
  for (uint64_t off = 0; !err && off < ex.size; off += sizeof cli_buffer) {
    uint64_t n = u_min(sizeof cli_buffer, ex.size - off);
    if (cli_progress(job, off, ex.size)) err = -ECANCELED;
    if (!err) err = cli_copy_piece(file, &ex, kind, off, n);
  }
  if (!err && kind == COPY_IN) err = ex.ops->flush(ex.ctx, 0);
  if (!err && kind != COPY_IN) {
    err = os_datasync(file);
    if (err == -EINVAL || err == -ENOTSUP) err = 0; /* a pipe, a terminal */
  }
  ex.ops->close(ex.ctx);
  return err;
}

/* import: makes a volume of a file.  If that fails, at whatever point, there is
 * no volume afterwards.  The size has to be known first, so a pipe will not
 * do. */
static int cli_do_import(struct cli_job *job, struct nbdserve_cas *cas) {
  const char *name = job->request.name;
  off_t size = lseek(job->fds.output, 0, SEEK_END);
  if (size < 0) return -errno;
  int err = nbdserve_cas_create(cas, name, (uint64_t)size);
  if (err) return err; /* what has that name already is not ours to remove */
  err = cli_do_copy(job, cas);
  assert(err <= 0);
  if (err) nbdserve_cas_rm(cas, name);
  return err;
}

/* ---- The table ---- */

/* clang-format off */
static const struct cli_verb cli_verbs[] = {
    {.name = "init", .operands = "STORE [BLOCK-SIZE]", .nmore = 1,
     .help = "make an empty store (4K)", .flags = VERB_SIZE},
    {.name = "create", .operands = "STORE::VOLUME SIZE", .noperands = 2,
     .help = "make a volume, all zeroes", .flags = VERB_SIZE,
     .run = cli_do_change, .change = NBDSERVE_CAS_CREATE},
    {.name = "import", .operands = "STORE::VOLUME FILE", .noperands = 2,
     .help = "make a volume of a file",
     .run = cli_do_import, .flags = VERB_IS_LONG | VERB_READS_FILE},
    {.name = "export", .operands = "STORE::NAME FILE", .noperands = 2,
     .help = "copy to a file (-: standard output)",
     .run = cli_do_copy, .flags = VERB_READS_ONLY | VERB_WRITES_FILE},
    {.name = "list", .operands = "STORE", .flags = VERB_READS_ONLY | VERB_ROWS,
     .help = "print name, size, time and id of each", .run = cli_do_list},
    {.name = "snapshot", .operands = "STORE::VOLUME@SNAPSHOT", .noperands = 1,
     .help = "keep what VOLUME holds now, under a name",
     .run = cli_do_change, .change = NBDSERVE_CAS_SNAPSHOT,
     .invalid = "not a name that a snapshot can have"},
    {.name = "seal", .operands = "STORE::VOLUME@SNAPSHOT", .noperands = 1,
     .help = "give it an id for its contents; print it",
     .run = cli_do_seal, .flags = VERB_IS_LONG, .invalid = "not a snapshot"},
    {.name = "rollback", .operands = "STORE::VOLUME@SNAPSHOT", .noperands = 1,
     .help = "make VOLUME what it was then", .flags = VERB_DRY_RUN,
     .run = cli_do_change, .change = NBDSERVE_CAS_ROLLBACK,
     .invalid = "not a snapshot"},
    {.name = "clone", .operands = "STORE::NAME VOLUME...", .noperands = 2,
     .help = "make volumes that begin as copies", .nmore = CLI_ANY_NUMBER,
     .run = cli_do_change, .change = NBDSERVE_CAS_CLONE},
    {.name = "rename", .operands = "STORE::NAME NEW", .noperands = 2,
     .help = "change a name", .invalid = "not a name that it can have",
     .run = cli_do_change, .change = NBDSERVE_CAS_RENAME},
    {.name = "resize", .operands = "STORE::VOLUME SIZE", .noperands = 2,
     .help = "cut a volume, or add zeroes", .flags = VERB_DRY_RUN | VERB_SIZE,
     .run = cli_do_change, .change = NBDSERVE_CAS_RESIZE},
    {.name = "rm", .operands = "STORE::NAME [NAME...]", .noperands = 1,
     .help = "remove volumes and snapshots", .nmore = CLI_ANY_NUMBER,
     .run = cli_do_change, .change = NBDSERVE_CAS_RM, .flags = VERB_DRY_RUN},
    {.name = "diff", .operands = "STORE::NAME NAME", .noperands = 2,
     .help = "print the ranges that differ",
     .run = cli_do_diff, .flags = VERB_READS_ONLY | VERB_ROWS},
    {.name = "verify", .operands = "STORE",
     .help = "check all data; print what is damaged",
     .run = cli_do_verify, .flags = VERB_READS_ONLY | VERB_ROWS | VERB_IS_LONG},
    {.name = "gc", .operands = "STORE", .run = cli_do_gc, .flags = VERB_IS_LONG,
     .help = "give unused space back; print its bytes"},
    {.name = "stat", .operands = "STORE", .help = "print how much is stored",
     .run = cli_do_stat, .flags = VERB_READS_ONLY | VERB_LINES},
    {.name = NULL}};
/* clang-format on */

/* ---- Doing a command ---- */

/* Says in words why a command has failed.  The errors of nbdserve.h mean more
 * here than what strerror has for them. */
static const char *cli_job_reason(const struct cli_job *job, int err) {
  const char *invalid = job->verb->invalid;
  if (err == -EBUSY) return "in use by a client, or being verified";
  if (err == -ENOTEMPTY) return "it has snapshots";
  if (err == -EUCLEAN) return "the store is damaged (verify names what is)";
  if (err != -EINVAL) return u_errno_text(err);
  return invalid ? invalid : "not a name or size that a volume can have";
}

/* Does a command on an open store, and prints what it has to say.  If it fails
 * the message goes to whoever gave the command: this may be the server.  (The
 * FILE of an import is not named in it, as the errors that come after it was
 * opened are about the volume.)  Returns the exit status.  job->verb has been
 * checked: see cli_run_verb for our own, and cli_serve_verb for what came
 * over the socket. */
static int cli_run_job(struct cli_job *job, struct nbdserve_cas *cas) {
  const char *name = job->request.name;
  const char *to = job->verb->flags & VERB_READS_FILE ? "" : job->request.to;
  assert(job->verb == &cli_verbs[job->request.verb] && job->verb->run);
  /* A command that is done several times prints nothing. */
  assert(!job->nrows && !job->lost && !job->shown_ms);
  job->begun_ms = os_now_ms();
  int err = job->verb->run(job, cas);
  cli_hide_progress(job);
  if (job->request.json && job->verb->flags & VERB_ROWS)
    cli_print(job, job->nrows ? "]\n" : "[]\n");
  if (!err) err = job->lost;
  if (!err) return CLI_OK;
  if (err != -EUCLEAN || !job->nrows) /* else the rows tell what is damaged */
    dprintf(job->fds.messages, "nbdserve: %s%s%s%s%s: %s\n", job->verb->name,
            *name ? " " : "", name, *to ? " " : "", to,
            cli_job_reason(job, err));
  return err == -EUCLEAN ? CLI_DAMAGED : CLI_FAILED;
}

/* ---- Commands over the control socket ----------------------------------- */

/* The control data of a message that carries two descriptors.  The union gives
 * the room the alignment of a header. */
union cli_passed {
  struct cmsghdr header;
  char room[CMSG_SPACE(sizeof(struct cli_fds))];
};

/* Returns the message that carries a job, in either direction: *data leads to
 * the request, and the descriptors are in *passed.  All three have to stay
 * where they are until the message was sent or received. */
static struct msghdr cli_message(struct cli_job *job, struct iovec *data,
                                 union cli_passed *passed) {
  const socklen_t len = CMSG_LEN(sizeof job->fds);
  *data = (struct iovec){&job->request, sizeof job->request};
  passed->header = (struct cmsghdr){.cmsg_len = len};
  passed->header.cmsg_level = SOL_SOCKET;
  passed->header.cmsg_type = SCM_RIGHTS;
  memcpy(CMSG_DATA(&passed->header), &job->fds, sizeof job->fds);
  return (struct msghdr){.msg_iov = data,
                         .msg_iovlen = 1,
                         .msg_control = passed,
                         .msg_controllen = len};
}

/* Lets the server of the store do a job, waits for it as long as it takes, and
 * returns the exit status.  The server gets duplicates of the descriptors.
 * Whoever has the store without listening at STORE.ctl is no server, or a
 * read-only one, or was built without threads.
 *
 * A STORE.ctl that is somebody else's is refused: in a directory where
 * everybody may make files a stranger who can read the store could lock it,
 * listen there, and get our descriptors.  A server runs as the owner of the
 * store, as ourselves, or as root. */
static int cli_run_remote(struct cli_job *job) {
  struct iovec data;
  union cli_passed passed;
  struct msghdr message = cli_message(job, &data, &passed);
  struct stat store;
  struct stat ctl;
  unsigned char status;
  if (stat(cli.store, &store) == 0 && lstat(cli.ctl_path, &ctl) == 0 &&
      ctl.st_uid != store.st_uid && ctl.st_uid != geteuid() && ctl.st_uid != 0)
    cli_failed("%s: belongs neither to the owner of the store nor to us",
               cli.ctl_path);
  int fd = srv_unix_socket(cli.ctl_path, SRV_CONNECT);
  if (fd < 0)
    cli_die(CLI_IN_USE, "%s: in use by a process that takes no commands",
            cli.store);
  /* A socket's buffer takes all of it at once. */
  if (sendmsg(fd, &message, MSG_NOSIGNAL) != (ssize_t)sizeof job->request ||
      read(fd, &status, 1) != 1)
    cli_failed("%s: no answer from the server of the store", cli.ctl_path);
  close(fd);
  return status;
}

/* Does what a client of the control socket asks for, and closes it.  It has to
 * come in one go: as long as we wait for it, others wait, too, so there is a
 * limit, which is over when a server that stops has waited for us.  A request
 * that makes no sense is dropped without an answer.
 *
 * Where no descriptor has come there is -1: the system writes over what we have
 * put into the message only what it has got.  There is room for two: if
 * somebody sends more, the system closes the rest. */
static void cli_serve_verb(int client) {
  struct cli_job job = {.fds = {.output = -1, .messages = -1},
                        .client = client};
  struct iovec data;
  union cli_passed passed;
  struct msghdr message = cli_message(&job, &data, &passed);
  os_set_receive_timeout(client, IO_GRACE_MS);
  ssize_t n = recvmsg(client, &message, MSG_WAITALL);
  memcpy(&job.fds, CMSG_DATA(&passed.header), sizeof job.fds);
  if (n > 0 && n < (ssize_t)sizeof job.request) { /* descriptors end a call */
    ssize_t more = recv(client, (unsigned char *)&job.request + n,
                        sizeof job.request - (size_t)n, MSG_WAITALL);
    if (more > 0) n += more;
  }
  unsigned verb = job.request.verb;
  if (n == (ssize_t)sizeof job.request && job.fds.messages >= 0 &&
      verb < COUNT_OF(cli_verbs) && cli_verbs[verb].run) {
    job.verb = &cli_verbs[verb];
    job.request.name[PATH_MAX - 1] = '\0';
    job.request.to[PATH_MAX - 1] = '\0';
    unsigned char status = (unsigned char)cli_run_job(&job, cli.cas);
    (void)!write(client, &status, 1); /* a client that has gone needs none */
  }
  close(job.fds.output); /* closing -1 does no harm */
  close(job.fds.messages);
  close(client);
}

/* The thread that takes commands until the server stops.  That makes
 * io_wait_input fail, and ends a command that is under way (cli_progress).  If
 * a client cannot be accepted, for want of descriptors, trying again at once
 * would not help. */
static void *cli_control(void *unused) {
  struct io io = {.in = cli.ctl, .stop = &cli.server->stop};
  (void)unused;
  while (io_wait_input(&io, 0) == 0) {
    int client = os_accept(cli.ctl);
    if (client >= 0)
      cli_serve_verb(client);
    else
      poll(NULL, 0, SRV_PAUSE_MS);
  }
  (void)!write(cli.ctl_ended[1], "", 1);
  return NULL;
}

/* ---- The store of this process ------------------------------------------ */

/* Opens the store at path.  The process has one at most.  Returns 0, or -errno
 * and leaves cli.cas NULL; on -EBUSY the caller may want cli.ctl_path. */
static int cli_open_store(const char *path, int readonly) {
  struct nbdserve_cas_options options = {
      .flags = (readonly ? NBDSERVE_CAS_READONLY : 0) |
               (opt[OPT_NO_VERIFY].given ? NBDSERVE_CAS_NO_VERIFY : 0)};
  assert(!cli.cas);
  if (snprintf(cli.store, PATH_MAX, "%s", path) >= PATH_MAX ||
      snprintf(cli.ctl_path, PATH_MAX, "%s.ctl", path) >= PATH_MAX)
    return -ENAMETOOLONG;
  int err = nbdserve_cas_open(path, &options, &cli.cas);
  if (err == -EINVAL) cli_failed("%s: not a store", path);
  assert(!err == !!cli.cas);
  return err;
}

/* Starts the thread that takes commands.  This comes after --fork and after the
 * command was started: from now on the process makes no other one, which would
 * inherit the descriptors that come with commands.  Without the thread nobody
 * would answer at STORE.ctl, and a command would wait for ever; so it goes. */
static void cli_start_control(void) {
  if (cli.ctl < 0) return;
  assert(cli.cas && !cli.ctl_ended[0]);
  int err = os_pipe(cli.ctl_ended);
  if (!err) err = os_thread(cli_control, NULL);
  if (!err) return;
  cli.ctl_ended[0] = 0;
  cli_remove_ctl();
  close(cli.ctl);
  cli_say("%s: %s; no commands are taken while it is served", cli.store,
          u_errno_text(err));
}

/* At exit: waits for the end of cli_control, and of the command that it may be
 * doing, which looks at whether the server has stopped.  Returns false if that
 * does not come in time.  The store must then be left as it is. */
static int cli_await_control(void) {
  struct pollfd ended = {cli.ctl_ended[0], POLLIN, 0};
  char byte;
  if (!cli.ctl_ended[0]) return 1;
  nbdserve_stop(cli.server);
  return poll(&ended, 1, IO_GRACE_MS) > 0 &&
         read(cli.ctl_ended[0], &byte, 1) == 1;
}

/* The `find` function of a server of all of a store: called in the threads of
 * clients, for each client, so that a volume that was made since is found. */
static int cli_find_volume(void *unused, const char *name,
                           struct nbdserve_export *out) {
  (void)unused;
  *out = cli_common;
  return nbdserve_cas_volume(cli.cas, name, out);
}

/* Where cli_emit_volume passes its names on to */
struct cli_emit {
  nbdserve_emit_fn *emit;
  void *arg;
};

/* Passes on a volume or snapshot: a nbdserve_list_fn */
static int cli_emit_volume(void *arg, const struct nbdserve_cas_info *info) {
  struct cli_emit *to = arg;
  return to->emit(to->arg, info->name, info->readonly ? "snapshot" : "");
}

/* The `list` function of a server of all of a store */
static int cli_list_volumes(void *unused, nbdserve_emit_fn *emit, void *arg) {
  struct cli_emit to = {emit, arg};
  (void)unused;
  return nbdserve_cas_list(cli.cas, cli_emit_volume, &to);
}

/* Opens a volume or snapshot of a store.  Before it opens the store, if that is
 * not open yet, and the socket for commands.  STORE.ctl is for ourselves and
 * root only: the umask is in force when it is made, so there is no moment at
 * which others get in.  If it cannot be made (its path may be too long for a
 * socket, or the directory read-only) the store is served all the same.  A
 * read-only server takes no commands: next to it the store can be opened by
 * other readers.
 *
 * With the name "" the server finds and lists all that is in the store, also
 * what is made later, and *ex stays as it is. */
static int cli_open_volume(const char *path, const char *name,
                           struct nbdserve_export *ex) {
  int readonly = opt[OPT_READ_ONLY].given != 0;
  if (*cli.store && strcmp(cli.store, path) != 0)
    cli_failed("%s: one store at a time: %s is open", path, cli.store);
  if (!cli.cas) {
    int err = cli_open_store(path, readonly);
    if (err) return err;
    mode_t mask = umask(0177);
    if (!readonly && !NBDSERVE_NO_THREADS)
      cli.ctl = srv_unix_socket(cli.ctl_path, SRV_LISTEN);
    umask(mask);
    if (cli.ctl >= 0) lstat(cli.ctl_path, &cli.ctl_st);
  }
  if (*name) return nbdserve_cas_volume(cli.cas, name, ex);
  cli.server->config.find = cli_find_volume;
  cli.server->config.list = cli_list_volumes;
  return 0;
}

/* ---- The command line of a command -------------------------------------- */

/* Finds out which store a command is for, and takes it off the operands:
 *
 *   STORE::NAME ...   the first operand becomes NAME
 *   NAME ...          for commands that take a name: $NBDSERVE_STORE
 *   STORE, STORE::    for commands that take none; the operand goes
 *   SIZE              only init: $NBDSERVE_STORE, if it is set
 *   nothing           $NBDSERVE_STORE
 *
 * Returns its path, or NULL if nothing names a store. */
static char *cli_take_store(const struct cli_verb *verb) {
  char *fallback = getenv("NBDSERVE_STORE");
  uint64_t size;
  if (!cli.ntargets) return fallback;
  char *first = *cli.targets;
  char *colons = strstr(first, "::");
  if (!colons && verb->noperands) return fallback;
  if (!colons && !verb->run && cli.ntargets == 1 && fallback &&
      u_parse_number(first, INT64_MAX, &size))
    return fallback;
  if (colons) {
    *cli.targets = colons + 2;
    *colons = '\0';
    if (verb->noperands || colons[2]) return first;
  }
  cli.targets++;
  cli.ntargets--;
  return first;
}

/* init: makes a store.  block_size is how `size` was written, or NULL.  Returns
 * the exit status. */
static int cli_init(const char *store, const char *block_size, uint64_t size) {
  struct nbdserve_cas_options options = {.block_size =
                                             (uint32_t)u_min(size, UINT32_MAX)};
  int err = nbdserve_cas_init(store, &options);
  if (err == -EINVAL && block_size)
    cli_usage("%s: not a block size (4K, 8K, 16K, 32K or 64K)", block_size);
  cli_exit_if_error(err, store);
  return CLI_OK;
}

/* Opens the FILE of an import or export, which takes the place of the output.
 * We do it, even if a server does the command: relative paths and permissions
 * are ours.  A FILE that is to be written may be a store, this one perhaps, or
 * an image that is being served: both are locked, and nobody wants to lose
 * them. */
static void cli_open_file(struct cli_job *job, const char *file) {
  int writes = (job->verb->flags & VERB_WRITES_FILE) != 0;
  if (writes && strcmp(file, "-") == 0) return;
  int flags = writes ? O_RDWR | O_CREAT : O_RDONLY;
  job->fds.output = open(file, flags | O_CLOEXEC, 0666);
  if (job->fds.output < 0) cli_exit_if_error(-errno, file);
  if (writes && os_lock_file(job->fds.output, 0))
    cli_die(CLI_IN_USE, "%s: in use", file);
}

/* Does a command on a store, here or at its server.  If it needs one operand,
 * it is done for each that there is; if it needs two, for the first with each
 * of the others; otherwise once.  An operand that does not fit is cut: it is
 * too long for a name in any case.  Returns the exit status of the first time
 * that it fails, or 0. */
static int cli_run_on_operands(struct cli_job *job) {
  int needed = job->verb->noperands;
  char *each = needed > 1 ? job->request.to : job->request.name;
  int i = needed > 1; /* the first of those that may repeat */
  int status;
  assert(cli.ntargets >= needed);
  if (needed > 1) snprintf(job->request.name, PATH_MAX, "%s", cli.targets[0]);
  do {
    if (needed) snprintf(each, PATH_MAX, "%s", cli.targets[i]);
    status = cli.cas ? cli_run_job(job, cli.cas) : cli_run_remote(job);
    i++;
  } while (!status && i < cli.ntargets);
  return status;
}

/* If the command line is a command on a store: does it, and ends the process.
 * Its first word has to be one of the names in cli_verbs; a file of such a name
 * is served as ./NAME.  --dry-run is refused where it would not be heeded. */
static void cli_run_verb(void) {
  struct cli_job job = {.fds = {.output = 1, .messages = 2}, .client = -1};
  const char *name = cli.ntargets ? cli.targets[0] : "";
  const struct cli_verb *verb = cli_verbs;
  while (verb->name && strcmp(verb->name, name) != 0)
    verb++;
  if (!verb->name) return;
  cli.targets++;
  cli.ntargets--;
  char *store = cli_take_store(verb);
  int n = cli.ntargets;
  assert(n >= 0);
  if (!store || n < verb->noperands || n - verb->noperands > verb->nmore ||
      (opt[OPT_DRY_RUN].given && !(verb->flags & VERB_DRY_RUN)))
    cli_usage("usage: nbdserve %s %s", name, verb->operands);
  const char *last = n ? cli.targets[n - 1] : NULL;
  job.verb = verb;
  job.request.verb = (unsigned char)(verb - cli_verbs);
  job.request.json = opt[OPT_JSON].given != 0;
  job.request.dry_run = opt[OPT_DRY_RUN].given != 0;
  if (last && verb->flags & VERB_SIZE &&
      !u_parse_number(last, INT64_MAX, &job.request.size))
    cli_usage("%s %s: not a size", name, last);
  if (!verb->run) exit(cli_init(store, last, job.request.size));
  if (verb->flags & (VERB_READS_FILE | VERB_WRITES_FILE))
    cli_open_file(&job, last);
  int err = cli_open_store(store, (verb->flags & VERB_READS_ONLY) != 0);
  if (err != -EBUSY) cli_exit_if_error(err, store);
  if (!err && verb->flags & VERB_IS_LONG) cli_catch_signals(cli_on_signal);
  exit(cli_run_on_operands(&job));
}

/* Prints the commands for --help. */
static void cli_help_verbs(void) {
  puts("\nCommands on stores, also while they are served.  NAME is VOLUME,\n"
       "VOLUME@SNAPSHOT or the id of a sealed snapshot; names that follow\n"
       "are in the same store.");
  for (const struct cli_verb *verb = cli_verbs; verb->name; verb++)
    printf("  %-9s %-23s %s\n", verb->name, verb->operands, verb->help);
}

#else /* NBDSERVE_NO_CAS: there are no commands, and no store can be opened. */
#define cli_start_control() ((void)0)
#define cli_await_control() 1
#define cli_open_volume(path, name, ex) (-EOPNOTSUPP)
#define nbdserve_cas_close(cas) 0
#define cli_run_verb() ((void)0)
#define cli_help_verbs() ((void)0)
#endif

/* ---- Targets ---------------------------------------------------------------
 * How the text of a target is read, the first line that fits:
 *
 *   file:PATH           a file, whatever PATH looks like
 *   NAME=TARGET         the export NAME of a TARGET; no "/" stands before "="
 *   STORE::VOLUME       a volume, a snapshot (VOLUME@NAME) or the id of one
 *   STORE::             all of a store
 *   mem:SIZE            memory
 *   PATH                a file or block device
 *
 * So a file whose name looks like one of the others needs "file:", or "./"
 * where only a "=" is the matter. */

/* A target, taken apart.  The texts belong to argv. */
struct cli_target {
  /* TARGET as it was written, without NAME=, for messages */
  const char *text;
  /* NAME, or NULL */
  const char *name;
  /* What stands behind "::", "" for all of a store; NULL: it is a file, a block
   * device or memory. */
  const char *volume;
  /* The path of the store; or of the file, as nbdserve_flat_open takes it, for
   * which mem:SIZE is one, too */
  char path[PATH_MAX];
};

/* Takes a target apart, in the order of the table above.  The text is cut at
 * the "=" behind NAME. */
static void cli_parse_target(char *text, struct cli_target *target) {
  static const char file[] = "file:";
  size_t nfile = sizeof file - 1;
  char *equals = text + strcspn(text, "/=");
  *target = (struct cli_target){.text = text};
  if (*equals == '=' && strncmp(text, file, nfile) != 0) {
    *equals = '\0';
    target->name = text;
    target->text = equals + 1;
  }
  const char *path = target->text;
  const char *colons = strstr(path, "::");
  const char *front = "";
  if (strncmp(path, file, nfile) == 0) {
    path += nfile;
    /* The backend must not take the file mem:5 for memory. */
    if (strncmp(path, "mem:", 4) == 0) front = "./";
  } else if (colons) {
    target->volume = colons + 2;
  }
  if (snprintf(target->path, PATH_MAX, "%s%s", front, path) >= PATH_MAX)
    cli_exit_if_error(-ENAMETOOLONG, target->text);
  if (target->volume) target->path[colons - path] = '\0';
}

/* Returns the name of the export of a target.  NULL: it is the only one, and
 * clients may call it what they like. */
static const char *cli_name_export(const struct cli_target *target) {
  assert(cli.ntargets > 0);
  if (target->name) return target->name;
  if (opt[OPT_EXPORT].text) return opt[OPT_EXPORT].text;
  if (cli.ntargets == 1) return NULL;
  if (target->volume) return target->volume;
  const char *slash = strrchr(target->path, '/');
  return slash ? slash + 1 : target->path;
}

#if NBDSERVE_NO_FLAT
#define cli_open_file_target(path, ex) (-EOPNOTSUPP)
#else
/* Opens a file, a block device or memory.  With --temporary what clients write
 * goes to a directory of the user's choice; a message about that names it, as
 * it is not the target that is wrong. */
static int cli_open_file_target(const char *path, struct nbdserve_export *ex) {
  struct nbdserve_flat options = {.offset = opt[OPT_OFFSET].number,
                                  .size = opt[OPT_SIZE].number,
                                  .create = opt[OPT_CREATE].number};
  if (opt[OPT_READ_ONLY].given) options.flags = NBDSERVE_FLAT_READONLY;
  if (opt[OPT_TEMPORARY].given) {
    options.flags = NBDSERVE_FLAT_TEMPORARY;
    options.dir = getenv("TMPDIR");
    if (!options.dir) options.dir = "/tmp";
    if (access(options.dir, W_OK) < 0) cli_exit_if_error(-errno, options.dir);
  }
  return nbdserve_flat_open(path, &options, ex);
}
#endif

/* If err is an error: ends the process with a message that says why the target
 * cannot be opened and, where an option helps, which one. */
static void cli_exit_if_unopened(int err, const struct cli_target *target) {
  const char *text = target->text;
  int writes = !opt[OPT_READ_ONLY].given && !opt[OPT_TEMPORARY].given;
  if ((err == -EACCES || err == -EROFS) && writes)
    cli_failed("%s: %s (-r serves it read-only)", text, u_errno_text(err));
  if (err == -ENOENT && !target->volume && writes && !opt[OPT_CREATE].number)
    cli_failed("%s: %s (--create SIZE makes it)", text, u_errno_text(err));
  if (err == -EINVAL && !target->volume)
    cli_failed("%s: not a file, block device or mem:SIZE, or --offset and "
               "--size exceed it",
               text);
  cli_exit_if_error(err, text);
}

/* Opens a target and adds it to the server, which takes over what is behind the
 * export; if it does not take the export, that is closed here.  A volume cannot
 * be cut like a file, and has clones in place of --temporary.  A whole store
 * adds no export: the server asks for each one when a client does. */
static void cli_add_target(char *text) {
  struct cli_target target;
  assert(cli.server && !cli.server->nlisteners);
  struct nbdserve_export ex = cli_common;
  cli_parse_target(text, &target);
  ex.name = cli_name_export(&target);
  ex.description = opt[OPT_DESCRIPTION].text;
  if (cli.ntargets == 1 && !ex.name) ex.flags |= NBDSERVE_EXPORT_FALLBACK;
  if (cli.ntargets == 1 && ex.name) cli.export_name = ex.name;
  if (target.volume && (opt[OPT_OFFSET].given || opt[OPT_SIZE].given ||
                        opt[OPT_CREATE].given || opt[OPT_TEMPORARY].given))
    cli_usage("%s: no --offset, --size, --create or --temporary with a store "
              "(clone it)",
              target.text);
  int err = target.volume ? cli_open_volume(target.path, target.volume, &ex)
                          : cli_open_file_target(target.path, &ex);
  cli_exit_if_unopened(err, &target);
  if (!ex.ops) return;
  assert(ex.ops->read && ex.ops->close);
  err = nbdserve_add(cli.server, &ex);
  if (err) ex.ops->close(ex.ctx);
  if (err == -EEXIST)
    cli_usage("%s: another target has that export name", target.text);
  if (err == -EINVAL)
    cli_usage("%s: --block-size, name or description out of range",
              target.text);
  cli_exit_if_error(err, target.text);
}

/* ---- Where to listen ---------------------------------------------------- */

/* Listens at an address, as nbdserve_listen takes it, or ends the process with
 * a message that says what is wrong with it. */
static void cli_listen_at(const char *address) {
  int err = nbdserve_listen(cli.server, address);
  if (err == -ENAMETOOLONG)
    cli_failed("%s: a socket path has at most %u bytes", address,
               (unsigned)sizeof(((struct sockaddr_un *)0)->sun_path) - 1);
  if (err == -EADDRINUSE)
    cli_failed("%s: %s; not replaced", address, u_errno_text(err));
  if (err == -EINVAL && strncmp(address, "tcp:", 4) == 0)
    cli_failed("%s: not a numeric address or localhost, or built without TCP",
               address);
  cli_exit_if_error(err, address);
}

/* Listens on a socket that whoever started us has opened.  If it is not one
 * that listens, it is connected to a client, the only one then: a second such
 * socket is an error. */
static void cli_listen_on_fd(int fd) {
  char address[32];
  assert(fd >= 0);
  snprintf(address, sizeof address, "fd:%d", fd);
  int err = nbdserve_listen(cli.server, address);
  if (err == -EINVAL && cli.client < 0)
    cli.client = fd;
  else
    cli_exit_if_error(err, address);
}

/* Listens on the sockets that systemd, or a program like nbdinfo, has passed to
 * us, and returns how many there are.  LISTEN_PID says whom they are for: the
 * variables are inherited by children, who must not believe them. */
static int cli_listen_on_passed(void) {
  const char *pid = getenv("LISTEN_PID");
  const char *fds = getenv("LISTEN_FDS");
  uint64_t n = 0;
  if (!pid || !fds || strtol(pid, NULL, 10) != (long)getpid()) return 0;
  if (!u_parse_number(fds, SRV_LISTENERS, &n))
    cli_failed("LISTEN_FDS: %s: not a number of sockets up to %d", fds,
               SRV_LISTENERS);
  for (int i = 0; i < (int)n; i++)
    cli_listen_on_fd(CLI_FIRST_PASSED_FD + i);
  return (int)n;
}

/* Listens on a unix socket at path.  If the path is relative it gets the
 * working directory in front, so that the URI is right from everywhere; but
 * only where the whole fits into the address of a socket, for the path alone
 * may. */
static void cli_listen_on_unix(const char *path) {
  char address[PATH_MAX + 8];
  char dir[sizeof(((struct sockaddr_un *)0)->sun_path)];
  size_t n = strlen(path);
  int fits = n + 1 < sizeof dir && *path != '/' &&
             getcwd(dir, sizeof dir - n - 1) != NULL;
  snprintf(address, sizeof address, "unix:%s%s%s", fits ? dir : "",
           fits ? "/" : "", path);
  cli_listen_at(address);
}

/* Listens on a private socket, in a directory that only its owner can enter.
 * The directory protects it; the mode, from the umask, is for those who look at
 * the socket alone.  A parent whose path is long is passed over: with what
 * comes behind it the path has to fit into the address of a socket on every
 * system. */
static void cli_listen_privately(void) {
  const char *const parents[] = {getenv("XDG_RUNTIME_DIR"), getenv("TMPDIR"),
                                 "/tmp"};
  char address[sizeof cli.private_dir + 16];
  for (int i = 0; i < 3 && !*cli.private_dir; i++) {
    if (!parents[i] || *parents[i] != '/' || strlen(parents[i]) > 80) continue;
    snprintf(cli.private_dir, sizeof cli.private_dir, "%s/nbdXXXXXX",
             parents[i]);
    if (!mkdtemp(cli.private_dir)) *cli.private_dir = '\0';
  }
  if (!*cli.private_dir)
    cli_failed("private socket: no directory for it (use -U)");
  assert(*cli.private_dir == '/');
  snprintf(address, sizeof address, "unix:%s/sock", cli.private_dir);
  mode_t mask = umask(0177);
  cli_listen_at(address);
  umask(mask);
}

/* Listens on TCP, and warns if others than this machine can connect. */
static void cli_listen_on_tcp(void) {
  const char *host = opt[OPT_BIND].text ? opt[OPT_BIND].text : "localhost";
  uint64_t port = opt[OPT_PORT].given ? opt[OPT_PORT].number : CLI_DEFAULT_PORT;
  char address[PATH_MAX];
  snprintf(address, sizeof address, "tcp:%s:%" PRIu64, host, port);
  cli_listen_at(address);
  int is_loopback = strcmp(host, "localhost") == 0 ||
                    strcmp(host, "::1") == 0 || strncmp(host, "127.", 4) == 0;
  if (!is_loopback && !opt[OPT_QUIET].given)
    cli_say("%s: no authentication: anyone can read and write", host);
}

/* Opens the sockets that the command line asks for.  If it does not ask for
 * any, takes over those that were passed to us, or makes a private one.  Only
 * sockets that we have opened have a URI that we know. */
static void cli_listen(void) {
  const char *path = opt[OPT_UNIX].text;
  int wants_tcp = opt[OPT_PORT].given || opt[OPT_BIND].given;
  int is_private = path ? strcmp(path, "-") == 0 : !wants_tcp;
  if (opt[OPT_STDIN].given) cli.client = 0;
  if (opt[OPT_FD].given) cli_listen_on_fd((int)opt[OPT_FD].number);
  if (opt[OPT_STDIN].given || opt[OPT_FD].given) return;
  if (!path && is_private && cli_listen_on_passed()) return;
  if (is_private)
    cli_listen_privately();
  else if (path)
    cli_listen_on_unix(path);
  if (wants_tcp) cli_listen_on_tcp();
  int err = nbdserve_uri(cli.server, cli.export_name, cli.uri, sizeof cli.uri);
  cli_exit_if_error(err, "URI");
}

/* ---- The command that is served (--run, --) ----------------------------- */

/* Returns a copy of the text, which is not freed, with the URI in place of each
 * {}. */
static char *cli_put_uri(const char *text) {
  char *copy = NULL;
  size_t len;
  assert(*cli.uri);
  FILE *out = open_memstream(&copy, &len);
  if (!out) cli_exit_if_error(-errno, "--");
  for (const char *hit = strstr(text, "{}"); hit; hit = strstr(text, "{}")) {
    fprintf(out, "%.*s%s", (int)(hit - text), text, cli.uri);
    text = hit + 2;
  }
  fputs(text, out);
  if (fclose(out) == EOF) cli_exit_if_error(-errno, "--");
  return copy;
}

/* Sets the variables that a shell command can use.  They have the names that
 * nbdkit gives them, so that scripts can be used with both. */
static void cli_set_variables(void) {
  assert(*cli.uri && cli.server->nlisteners > 0);
  const struct srv_listener *l = cli.server->listeners;
  char nbd[sizeof l->text + 16];
  const char *colon = strrchr(l->text, ':');
  snprintf(nbd, sizeof nbd, "nbd:%s%s", l->is_unix ? "unix:" : "", l->text);
  setenv("nbd", nbd, 1);
  setenv("uri", cli.uri, 1);
  setenv("unixsocket", l->is_unix ? l->text : "", 1);
  setenv("port", l->is_unix || !colon ? "" : colon + 1, 1);
  setenv("exportname", cli.export_name, 1);
}

/* In the child: becomes the command.  Returns only if that fails, with the exit
 * status.  The descriptors that we have opened close themselves. */
static int cli_exec_child(void) {
  const char *program = "/bin/sh";
  if (cli.command) {
    program = cli.command[0];
    execvp(program, cli.command);
  } else {
    cli_set_variables();
    execl(program, "sh", "-c", opt[OPT_RUN].text, (char *)NULL);
  }
  cli_say("%s: %s", program, u_errno_text(-errno));
  return CLI_NOT_FOUND;
}

/* Starts the command.  It is a child of the process, not the other way round,
 * so that we can pass on its status.  The signals are blocked until its process
 * id is known to the handler: it may have ended by then, and SIGCHLD be
 * waiting.  If a signal has asked for the end already, there is nobody to serve
 * the command, so it is not started. */
static void cli_start_child(void) {
  sigset_t was;
  assert(!cli.child);
  if (!*cli.uri) cli_usage("no URI for the command to use");
  for (char **word = cli.command; word && *word; word++)
    *word = cli_put_uri(*word);
  cli_block_signals(&was);
  if (cli.phase == CLI_SERVING) {
    pid_t pid = fork();
    if (pid < 0) cli_exit_if_error(-errno, "fork");
    if (pid == 0) {
      cli_catch_signals(SIG_DFL); /* first: it must not run our handler */
      sigprocmask(SIG_SETMASK, &was, NULL);
      _exit(cli_exec_child());
    }
    cli.child = pid;
  } else {
    cli.child_status = CLI_FAILED; /* what never ran has not succeeded */
  }
  sigprocmask(SIG_SETMASK, &was, NULL);
}

/* Step 5 of the end.  Usually the command has ended, which is what has brought
 * us here, or has been told and had its time.  If it has not been told (the
 * server has failed, or two signals have come at once) that is done now; in the
 * first case there is time to wait for it. */
static void cli_await_child(void) {
  sigset_t was;
  cli_tell_child();
  cli_block_signals(&was);
  if (cli.child && cli.phase == CLI_SERVING) cli.phase = CLI_CHILD_ENDS;
  while (cli.child && cli.phase != CLI_STOPPING)
    sigsuspend(&was); /* until the handler has run */
  if (cli.child) {
    assert(cli.child_told);
    cli_say("%s: the command still runs after SIGTERM; not waited for",
            cli.command ? cli.command[0] : "--run");
    cli.child_status = CLI_FAILED;
  }
  sigprocmask(SIG_SETMASK, &was, NULL);
}

/* ---- Getting ready ------------------------------------------------------ */

/* --fork: goes on in a child.  Only the child returns.  The parent waits for a
 * byte from it, which says that it is ready, and exits.  If the pipe is closed
 * without one, the child has failed, and the parent passes its status on.  This
 * comes before anything is opened: threads would not come along. */
static void cli_fork(void) {
  int fd[2];
  char byte;
  assert(!cli.cas && !cli.server->nlisteners);
  pid_t pid = pipe(fd) < 0 ? -1 : fork();
  if (pid < 0) cli_exit_if_error(-errno, "--fork");
  if (pid == 0) {
    close(fd[0]);
    cli.ready_pipe = fd[1];
    if (setsid() < 0) cli_exit_if_error(-errno, "--fork");
    return;
  }
  close(fd[1]);
  if (read(fd[0], &byte, 1) == 1) _exit(CLI_OK);
  int wait_status = 0;
  waitpid(pid, &wait_status, 0);
  int status = cli_exit_status(wait_status);
  _exit(status ? status : CLI_FAILED);
}

/* --fork: lets go of the terminal, and tells the parent.  If the parent has
 * gone there is nobody to tell. */
static void cli_leave_terminal(void) {
  assert(cli.ready_pipe > 2);
  int null = open("/dev/null", O_RDWR);
  if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
    cli_exit_if_error(-errno, "/dev/null");
  close(null);
  (void)!write(cli.ready_pipe, "", 1);
  close(cli.ready_pipe);
}

/* Tells everybody who wants to know that all is open and we listen.  Whoever is
 * told may connect at once.  --ready-fd is closed, which is a sign in itself,
 * and the command does not get it.  With a command, that is who uses the URI,
 * and standard output is the command's. */
static void cli_tell_ready(void) {
  int fd = (int)opt[OPT_READY_FD].number;
  if (opt[OPT_PIDFILE].text) cli_write_pidfile(opt[OPT_PIDFILE].text);
  assert(!opt[OPT_READY_FD].given || fd > 2);
  if (opt[OPT_READY_FD].given &&
      ((*cli.uri && dprintf(fd, "%s\n", cli.uri) < 0) || close(fd) < 0))
    cli_exit_if_error(-errno, "--ready-fd");
  if (opt[OPT_RUN].given)
    cli_start_child();
  else if (*cli.uri && dprintf(1, "%s\n", cli.uri) < 0)
    cli_exit_if_error(-errno, "standard output");
  if (cli.ready_pipe >= 0) cli_leave_terminal();
}

/* ---- Serving ------------------------------------------------------------ */

/* Prints the totals, for --stats and SIGUSR1: as JSON, with the names that
 * nbdserve.h has for them, or in words. */
static void cli_print_stats(void) {
  static const char json[] =
      "{\"clients\":%" PRIu64 ",\"clients_now\":%" PRIu64
      ",\"requests\":%" PRIu64 ",\"errors\":%" PRIu64 ",\"bytes_read\":%" PRIu64
      ",\"bytes_written\":%" PRIu64 ",\"flushes\":%" PRIu64 "}\n";
  static const char words[] =
      "nbdserve: %" PRIu64 " clients (%" PRIu64 " now), %" PRIu64
      " requests (%" PRIu64 " failed), %" PRIu64 " bytes read, %" PRIu64
      " written, %" PRIu64 " flushes\n";
  struct nbdserve_stats stats;
  nbdserve_stats(cli.server, &stats);
  dprintf(2, opt[OPT_JSON].given ? json : words, stats.clients,
          stats.clients_now, stats.requests, stats.errors, stats.bytes_read,
          stats.bytes_written, stats.flushes);
}

/* Runs the server to its end, and does what the signal handler leaves to
 * others: it prints totals, and does steps 1 and 2 of the end.  Returns what
 * nbdserve_run does. */
static int cli_run(void) {
  for (;;) {
    int err = nbdserve_run(cli.server);
    if (err != -EINTR) return err;
    if (cli.stats_wanted) {
      cli.stats_wanted = 0;
      cli_print_stats();
    }
    if (cli.phase == CLI_CHILD_ENDS) {
      nbdserve_unlisten(cli.server);
      cli_tell_child();
    }
  }
}

/* Serves until the end.  Returns the exit status, which is the command's if
 * there was one and it has failed.  A client that is the only one is served
 * here; after that cli_run has nothing to do but to flush. */
static int cli_serve(void) {
  int err = 0;
  cli_start_control();
  if (cli.client >= 0) {
    int out = opt[OPT_STDIN].given ? 1 : cli.client;
    err = nbdserve_serve(cli.server, cli.client, out, NULL);
    nbdserve_stop(cli.server);
  }
  int run_err = cli_run();
  if (opt[OPT_STATS].given || cli.stats_wanted) cli_print_stats();
  cli_await_child();
  if (cli.child_status) return cli.child_status;
  return err || run_err ? CLI_FAILED : CLI_OK;
}

/* At exit, however that comes about: removes what we have made, first what
 * tells others that we are here, and closes what we have opened.  Clients and
 * commands use the store, so it is closed after they have ended.  If a command
 * does not end, the store stays open: opening it next time repairs what is
 * unfinished.  From here on signals are ignored. */
static void cli_close(void) {
  cli_catch_signals(SIG_IGN);
  if (cli.pidfile) os_remove_own_file(opt[OPT_PIDFILE].text, cli.pidfile);
  cli_remove_ctl();
  int is_finished = cli_await_control();
  nbdserve_free(cli.server);
  int err = is_finished && cli.cas ? nbdserve_cas_close(cli.cas) : 0;
  if (*cli.private_dir) rmdir(cli.private_dir);
  if (is_finished && !err) return;
  cli_say("%s: %s", cli.store,
          err ? u_errno_text(err) : "a command was not finished");
  _exit(CLI_FAILED);
}

/* ---- The command line as a whole ---------------------------------------- */

/* --help.  README has a copy of what this prints; a test compares them.
 * Options without a letter are indented, so that all names are in one
 * column. */
static int cli_help(void) {
  puts("usage: nbdserve [OPTION]... [NAME=]TARGET... [-- CMD ARG...]\n"
       "       nbdserve COMMAND ARG...\n"
       "Serves disks over NBD.  TARGET is a file, a block device, mem:SIZE,\n"
       "file:PATH (a file whatever its name looks like), STORE::VOLUME,\n"
       "STORE::VOLUME@SNAPSHOT or, for a whole store, STORE::.\n"
       "With CMD: serves while CMD runs; {} in an ARG becomes the URI.\n");
  for (int id = OPT_NONE + 1; id < OPT_COUNT; id++) {
    const struct cli_option *option = &cli_options[id];
    const char *argument = option->argument ? option->argument : "";
    const char letter[] = {'-', option->letter, ',', '\0'};
    printf("  %3s --%s %-*s %s\n", option->letter ? letter : "", option->name,
           18 - (int)strlen(option->name), argument, option->help);
  }
  cli_help_verbs();
  puts("\nNumbers take K, M, G, T, P and E (powers of 1024).  Once it\n"
       "listens it prints the URI.  Exit status: 0 success, 1 failure,\n"
       "2 usage, 3 verify found damage, 4 target in use, or the status\n"
       "of CMD.");
  return fflush(stdout) == EOF ? CLI_FAILED : CLI_OK;
}

/* --version.  The words tell what the build has; --help leaves out what it has
 * not. */
static int cli_version(void) {
  printf("nbdserve %s%s%s%s%s%s\n", nbdserve_version(),
         NBDSERVE_NO_FLAT ? "" : " flat", NBDSERVE_NO_CAS ? "" : " cas",
         NBDSERVE_NO_TCP ? "" : " tcp", NBDSERVE_NO_THREADS ? "" : " threads",
         NBDSERVE_POSIX_ONLY ? " posix-only" : "");
  return fflush(stdout) == EOF ? CLI_FAILED : CLI_OK;
}

/* Opens those of the descriptors 0 to 2 that are not open.  Otherwise an image
 * could become one of them, and our messages would be written to it. */
static void cli_open_standard_fds(void) {
  int fd = 0;
  while (fd >= 0 && fd <= 2)
    fd = open("/dev/null", O_RDWR);
  if (fd > 2) close(fd);
}

/* Makes the server as the options want it.  Commands on stores need one, too: a
 * signal ends them by way of nbdserve_stop. */
static void cli_new_server(void) {
  struct nbdserve_config config = {
      .version = NBDSERVE_VERSION_NUMBER,
      .threads = (uint32_t)opt[OPT_THREADS].number,
      .max_conn = (uint32_t)opt[OPT_MAX_CONN].number,
      .stall_ms = (uint32_t)opt[OPT_STALL].number * 1000,
      .idle_exit_ms = (uint32_t)opt[OPT_IDLE_EXIT].number * 1000,
      .without = cli_without,
      .log_level = NBDSERVE_LOG_WARNING + (int)u_min(opt[OPT_VERBOSE].given, 2),
      .log = cli_log};
  if (opt[OPT_QUIET].given) config.log_level = NBDSERVE_LOG_ERROR;
  if (opt[OPT_ONCE].given) config.flags |= NBDSERVE_CONFIG_ONCE;
  if (opt[OPT_FAULT].given || opt[OPT_DELAY].given) config.before = cli_before;
  cli_exit_if_error(nbdserve_new(&cli.server, &config), "start");
}

/* A command on a store, or a server from its start to its end: see the head of
 * this section.  The order matters: --fork before threads and locks, signals
 * before anything that must be removed, targets before sockets, so that whoever
 * can connect finds them. */
int main(int argc, char **argv) {
  cli_open_standard_fds();
  atexit(cli_close);
  if (argc > 0) cli_parse(argv);
  if (opt[OPT_HELP].given) return cli_help();
  if (opt[OPT_VERSION].given) return cli_version();
  cli_new_server();
  cli_run_verb();
  cli_check_options();
  if (opt[OPT_FORK].given) cli_fork();
  cli_catch_signals(cli_on_signal);
  for (int i = 0; i < cli.ntargets; i++)
    cli_add_target(cli.targets[i]);
  cli_listen();
  cli_tell_ready();
  return cli_serve();
}

#endif /* !NBDSERVE_NO_MAIN */
