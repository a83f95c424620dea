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
 *   [11] CLIENT        peer_      a client of other servers
 *   [12] CAS           cas_       store of volumes and snapshots
 *   [13] SERVER        srv_       listeners, clients, the public calls
 *   [14] CLI           cli_       the command
 *
 * ---- Where to read about ... ----------------------------------------------
 *   the life of a request, threads and buffers               head of [9]
 *   the states of a request                                  [5]
 *   what makes a FLUSH cover another client's WRITE          (E3) in [7], (T3)
 *   a client that never reads, or stops halfway              (I2) in [6], (T5)
 *   what happens when the server stops                       (S3) in [13]
 *   the format of a store, and what keeps it whole           end of nbdserve.h
 *
 * ---- Where to add ... -----------------------------------------------------
 *   an option of the handshake  its number NBD_OPT_ in [5]; a function and a
 *                               row of hs_options in [8]
 *   a command                   its number in enum nbd_cmd; a row of wire_cmds;
 *                               a case in ex_call [7]; a line in
 *                               ex_ask_info if clients must be told
 *   a rule for requests         an `if` in tx_validate [9]
 *   a type of reply             its number in enum nbd_reply_type; when it is
 *                               sent and its head in tx_put_head, its data in
 *                               tx_gather [9]
 *   a command-line option       a row of CLI_OPTIONS in [14]
 *   a command on stores         a row of cli_verbs in [14]
 *   a kind of target            cli_add_target in [14]
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
 *   worker      a client's thread,     tx_worker: one request  itself, if idle
 *               when a request may     or list of requests at  for 5 s, or the
 *               take long              a time                  client's thread
 *   store's     a request or command   cas_work: fills the     itself, when it
 *               that leaves work       index, checkpoints      is done
 *               behind
 *   control     the command, when it   cli_control: accepts    the server's
 *               serves a store         commands on that store  end
 *   job         control, for each      cli_serve_job: does     itself, or the
 *               command                that command            server's end
 *
 * ---- Locks, in the order in which they may be taken ------------------------
 * Each is named after the struct that it is in.
 *   1. nbdserve.lock      exports and their sizes, the list of clients, the
 *                         number of commands that are being done, statistics
 *   2. conn.queue_lock    a client's queue and workers
 *   3. conn.send_lock     one writer on a client's socket at a time: the only
 *                         lock that is held while we wait for a client, and
 *                         only that client is delayed by it
 *   4. ex.serial          one call into an NBDSERVE_EXPORT_SERIAL backend
 *   5. ex.lock            an export's flush that runs, and its result
 *   6. flat.region[], then .lock: a block of a temporary export while it comes
 *                         to the overlay; what is there; what a file has turned
 *                         out not to support
 *   7. nbdserve_cas.ckpt, then .lock: see [12] */

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
#ifndef NBDSERVE_NO_CLIENT
#define NBDSERVE_NO_CLIENT 0 /* no pull, no repair from another server */
#endif
#ifndef NBDSERVE_NO_SANDBOX
#define NBDSERVE_NO_SANDBOX 0 /* no --sandbox */
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

#if NBDSERVE_NO_FLAT && NBDSERVE_NO_CAS && !NBDSERVE_NO_MAIN
#error "the program needs a backend: files (NO_FLAT) or stores (NO_CAS)"
#endif

/* ==== [2] PLATFORM (os_) =================================================
 * Everything that differs between systems.  A call that a system lacks, or
 * that a sandbox forbids, ends in a portable way or in -EOPNOTSUPP; no other
 * section asks which system this is.  Only locks are used, as tcc has no
 * atomics.  What is inline here is not used in every build. */
#if defined __linux__ && !defined _GNU_SOURCE
#define _GNU_SOURCE 1
#elif defined __APPLE__ && !defined _DARWIN_C_SOURCE
#define _DARWIN_C_SOURCE 1
#elif defined __NetBSD__ && !defined _NETBSD_SOURCE
#define _NETBSD_SOURCE 1
#endif
#define _FILE_OFFSET_BITS 64 /* as -D_FILE_OFFSET_BITS=64, which may be, too */

#include "nbdserve.h"

#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <netdb.h>
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
#include <sys/statvfs.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#include <sys/syscall.h>
#endif
#if NBDSERVE_NO_CAS || NBDSERVE_NO_HWSHA || NBDSERVE_POSIX_ONLY || \
    !defined __GNUC__ || defined __TINYC__ || defined __PCC__ || \
    defined __dietlibc__
/* SHA-256 is computed in plain C. */
#elif defined __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#define OS_HWSHA __attribute__((target("sha,sse4.1")))
#define OS_SHA_ORDER 3, 2, 7, 6, 1, 0, 5, 4 /* see sha_place */
typedef __m128i os_words; /* four words of 32 bits, in one register */
#define os_add_words _mm_add_epi32
#define os_swap_words(v) \
  _mm_shuffle_epi8(v, _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203))
#define os_next_words(w) \
  _mm_sha256msg2_epu32(os_add_words(_mm_sha256msg1_epu32((w)[0], (w)[1]), \
                                    _mm_alignr_epi8((w)[3], (w)[2], 4)), \
                       (w)[3])

/* Does four rounds of SHA-256 on a state, whose words [4] calls A to H.  add:
 * the constants of the rounds plus the message's words.  Each instruction does
 * two rounds, with the lower half of add.  The old ABEF is the new
 * CDGH, so the halves change places twice. */
static OS_HWSHA void os_rounds(os_words *abef, os_words *cdgh, os_words add) {
  *cdgh = _mm_sha256rnds2_epu32(*cdgh, *abef, add);
  add = _mm_shuffle_epi32(add, 14); /* the upper half */
  *abef = _mm_sha256rnds2_epu32(*abef, *cdgh, add);
}

/* Does this processor have the SHA-256 instructions that [4] uses?  Each that
 * has them has SSE4.1, too. */
static int os_has_hwsha(void) {
  unsigned ebx = 0; /* what the processor does not tell stays 0 */
  unsigned unused;
  __get_cpuid_count(7, 0, &unused, &ebx, &unused, &unused);
  return (ebx & bit_SHA) != 0;
}
#elif defined __aarch64__ && !defined __AARCH64EB__ && defined __linux__ && \
    (!defined __clang__ || __clang_major__ >= 16)
#include <arm_neon.h>
#include <sys/auxv.h>
#ifdef __clang__
#define OS_HWSHA __attribute__((target("sha2")))
#else
#define OS_HWSHA __attribute__((target("+crypto")))
#endif
#define OS_SHA_ORDER 0, 1, 2, 3, 4, 5, 6, 7
typedef uint32x4_t os_words;
#define os_add_words vaddq_u32
#define os_swap_words(v) \
  vreinterpretq_u32_u8(vrev32q_u8(vreinterpretq_u8_u32(v)))
#define os_next_words(w) \
  vsha256su1q_u32(vsha256su0q_u32((w)[0], (w)[1]), (w)[2], (w)[3])

/* The same.  Here abef holds A, B, C, D, and cdgh E, F, G, H. */
static OS_HWSHA void os_rounds(os_words *abef, os_words *cdgh, os_words add) {
  os_words abcd = *abef;
  *abef = vsha256hq_u32(abcd, *cdgh, add);
  *cdgh = vsha256h2q_u32(*cdgh, abcd, add);
}

/* The same.  The kernel tells by bit 6 of AT_HWCAP. */
static int os_has_hwsha(void) {
  return (getauxval(AT_HWCAP) >> 6 & 1) != 0;
}
#endif
#ifndef OS_HWSHA
#define os_has_hwsha() 0
#define OS_SHA_ORDER 0, 1, 2, 3, 4, 5, 6, 7
#endif

#if defined(__GLIBC__) && !NBDSERVE_NO_MAIN
#include <malloc.h>
/* Has all threads take memory from one heap.  Else glibc makes one for each of
 * them, as far as it gets the space, and what is free in one is lacking in
 * others.  Memory is asked for rarely enough. */
#define os_share_heap() ((void)mallopt(M_ARENA_MAX, 1))
#elif !NBDSERVE_NO_MAIN
/* Elsewhere there is one, or no way to say so. */
#define os_share_heap() ((void)0)
#endif

/* Prototypes, in case these are functions of the host's.  The parentheses keep
 * a function-like macro called malloc or free from being expanded here. */
void *(NBDSERVE_MALLOC)(size_t);
void(NBDSERVE_FREE)(void *);

#define STATIC_ASSERT(name, cond) typedef char assert_##name[(cond) ? 1 : -1]
STATIC_ASSERT(off_t_has_64_bits, sizeof(off_t) >= 8);

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

#if defined __linux__ && !NBDSERVE_POSIX_ONLY
#define OS_LINUX /* all that Linux has may be used */
#endif
#ifndef SOCK_CLOEXEC
#define SOCK_CLOEXEC 0 /* os_set_fd_flags does it, a little later */
#endif
#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* SO_NOSIGPIPE does it: see os_setup_client */
#endif
#ifndef MSG_MORE
#define MSG_MORE 0 /* what follows leaves in a packet of its own */
#endif
#ifndef _SC_NPROCESSORS_ONLN
#define _SC_NPROCESSORS_ONLN (-1) /* sysconf() does not know it either */
#endif
#ifndef EUCLEAN
#define EUCLEAN 117 /* as nbdserve.h says: Linux has it */
#endif
/* Lets compilers check the calls of a function like printf.  All that we know
 * of take attributes, or have glibc take them away. */
#define OS_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))

/* ---- Locks and threads --------------------------------------------------
 * A monitor is a mutex and a condition variable: os_wait gives the mutex back
 * while it sleeps, and holds it again when it returns. */
#if NBDSERVE_NO_THREADS

/* With one thread there is nothing to lock and nobody to wait for. */
struct os_monitor {
  char unused;
};
#define os_monitor_init(m) ((m)->unused = 0)
#define os_must(call) ((void)0)
#define os_wait_ms(m, ms) ((void)(m), (void)(ms))

/* Runs fn to its end, at once. */
#define os_thread(fn, arg) ((void)fn(arg), 0)

#else
#include <pthread.h>

struct os_monitor {
  pthread_mutex_t mutex;
  pthread_cond_t cond;
};

/* Makes a monitor, as POSIX allows it. */
static void os_monitor_init(struct os_monitor *m) {
  *m = (struct os_monitor){.mutex = PTHREAD_MUTEX_INITIALIZER,
                           .cond = PTHREAD_COND_INITIALIZER};
}

/* Calls on a monitor that was made fail only if the caller is wrong. */
static void os_must(int err) {
  assert(!err);
  (void)err;
}

/* Waits until woken, or for so many milliseconds.  The system's clock may be
 * set meanwhile, and the wait be longer or shorter for it. */
static inline void os_wait_ms(struct os_monitor *m, int ms) {
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  int64_t ns = until.tv_nsec + (int64_t)ms * 1000000;
  until.tv_sec += (time_t)(ns / 1000000000);
  until.tv_nsec = (long)(ns % 1000000000);
  int err = pthread_cond_timedwait(&m->cond, &m->mutex, &until);
  os_must(err == ETIMEDOUT ? 0 : err);
}

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

/* Frees what a monitor may hold. */
static void os_monitor_free(struct os_monitor *m) {
  (void)m;
  os_must(pthread_cond_destroy(&m->cond));
  os_must(pthread_mutex_destroy(&m->mutex));
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

/* ---- Time, descriptors, sockets ------------------------------------------ */

/* Nanoseconds of a clock that never jumps. */
static uint64_t os_now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* Milliseconds of the same clock. */
static int64_t os_now_ms(void) {
  return (int64_t)(os_now_ns() / 1000000);
}

/* Makes calls on fd wait (blocking is 0) or not (O_NONBLOCK), and keeps
 * programs that the host runs from inheriting it. */
static void os_set_fd_flags(int fd, int blocking) {
  fcntl(fd, F_SETFL, (fcntl(fd, F_GETFL) & ~O_NONBLOCK) | blocking);
  fcntl(fd, F_SETFD, FD_CLOEXEC);
}

/* Makes a channel that never blocks: what is written to fd[1] is read from
 * fd[0] and, apart from that, what is written to fd[0] from fd[1].  It is a
 * socket pair, because most systems can make that with FD_CLOEXEC at once.
 * After an error fd is as it was. */
static int os_pipe(int fd[2]) {
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd) < 0) return -errno;
  os_set_fd_flags(fd[0], O_NONBLOCK);
  os_set_fd_flags(fd[1], O_NONBLOCK);
  assert(fd[0] >= 0 && fd[1] >= 0);
  return 0;
}

/* ---- The kernel's client --------------------------------------------------
 * Linux has a client of its own, behind /dev/nbdN.  It is given a socket by
 * messages of generic netlink: netlink(7), <linux/genetlink.h> and
 * <linux/nbd-netlink.h>, of which not every libc comes with the latter two.
 *
 * It gets one socket.  With several it gives up a request, and its socket,
 * after 30 seconds; with one it waits for as long as the server takes. */

/* What it can be told to do: NBD_CMD_... of <linux/nbd-netlink.h> */
enum os_nbd_command {
  OS_NBD_CONNECT = 1,
  OS_NBD_DISCONNECT = 2,
  OS_NBD_RECONFIGURE = 3 /* gives it a socket in place of a dead one */
};

enum {
  OS_NBD_OWNER = 4000 /* bytes of an owner's name, at most */
};

/* What it has to know to connect */
struct os_nbd {
  uint64_t size;       /* bytes */
  uint64_t block_size; /* bytes */
  uint64_t flags;      /* of the transmission */
  uint64_t patience;   /* seconds that it waits for another socket in place of
                          a dead one before requests fail */
  const char *owner;   /* a name of what is served; only a server that gives the
                          same one may replace the socket */
  int socket;
};

#if defined OS_LINUX && !NBDSERVE_NO_MAIN
/* Asks the system to send us SIGTERM when the thread that started us ends. */
#define os_end_with_parent() (prctl(PR_SET_PDEATHSIG, SIGTERM) ? -errno : 0)

/* The kernel may free memory by writing to our device.  If we waited for memory
 * then, both would wait for ever: PR_SET_IO_FLUSHER keeps this thread, and
 * those that it starts, from that.  Without CAP_SYS_RESOURCE it fails, and we
 * go on. */
#define OS_SET_IO_FLUSHER 57
#define os_serve_writeback() ((void)prctl(OS_SET_IO_FLUSHER, 1, 0, 0, 0))

/* A message.  Its numbers are in the byte order of this machine; behind it come
 * attributes, each 2 bytes of length, 2 of type, the value, and up to 3 bytes
 * for the next one to begin at a multiple of 4. */
struct os_message {
  uint32_t len; /* of all of it */
  uint16_t type;
  uint16_t flags;
  uint32_t unused[2];
  unsigned char command;
  unsigned char version;
  uint16_t unused2;
  unsigned char attributes[2 * OS_NBD_OWNER];
};

enum {
  OS_MESSAGE_LEN = offsetof(struct os_message, attributes),
  OS_NETLINK_GENERIC = 16,
  OS_NETLINK_ERROR = 2,     /* type of the message that ends an answer */
  OS_NETLINK_FLAGS = 1 + 4, /* NLM_F_REQUEST and NLM_F_ACK */
  OS_NETLINK_CONTROL = 16,  /* the type that knows the numbers of others, */
  OS_GET_FAMILY = 3,        /* its command for that, and its attributes */
  OS_FAMILY_ID = 1,
  OS_FAMILY_NAME = 2,
  /* attributes of the commands of <linux/nbd-netlink.h> */
  OS_NBD_INDEX = 1,
  OS_NBD_SIZE = 2,
  OS_NBD_BLOCK_SIZE = 3,
  OS_NBD_FLAGS = 5,
  OS_NBD_SOCKETS = 7, /* in it an item (1), and in that a descriptor (1) */
  OS_NBD_PATIENCE = 8,
  OS_NBD_BACKEND = 10
};

/* Adds an attribute to a message. */
static void os_add_attribute(struct os_message *m, unsigned type,
                             const void *value, size_t len) {
  const uint16_t head[2] = {(uint16_t)(sizeof head + len), (uint16_t)type};
  unsigned char *p = (unsigned char *)m + m->len;
  assert(m->len + sizeof head + len + 4 <= sizeof *m);
  memcpy(p, head, sizeof head);
  memcpy(p + sizeof head, value, len);
  m->len += (uint32_t)((sizeof head + len + 3) / 4 * 4);
}

/* Sends a message and waits for the answer.  The value of an attribute of 16
 * bits goes to *value, if the answer has it.  0 or -errno. */
static int os_ask_kernel(int fd, struct os_message *m, uint16_t type,
                         uint16_t *value) {
  uint16_t head[2];
  int32_t err;
  if (send(fd, m, m->len, 0) < 0) return -errno;
  for (;;) {
    ssize_t n = recv(fd, m, sizeof *m, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < OS_MESSAGE_LEN) return n < 0 ? -errno : -EPROTO;
    if (m->type == OS_NETLINK_ERROR) break;
    for (const unsigned char *p = m->attributes, *end = (unsigned char *)m + n;
         end - p > (ptrdiff_t)sizeof head; p += (*head + 3u) / 4 * 4) {
      memcpy(head, p, sizeof head);
      assert(*head >= sizeof head); /* else the kernel would be wrong */
      if (head[1] == type) memcpy(value, p + sizeof head, sizeof *value);
    }
  }
  memcpy(&err, &m->command, sizeof err); /* such a message has no command */
  return err;
}

/* Tells the kernel's client to do something with /dev/nbdINDEX.  nbd: NULL to
 * disconnect.  -ENOENT: this kernel has no such client, or there is no such
 * device.  -EPERM: only root may do that.  -EBUSY: it is connected.  Others as
 * socket(2). */
static int os_tell_nbd(enum os_nbd_command command, uint32_t index,
                       const struct os_nbd *nbd) {
  struct os_message ask = {OS_MESSAGE_LEN, OS_NETLINK_CONTROL, OS_NETLINK_FLAGS,
                           .command = OS_GET_FAMILY, .version = 1};
  struct os_message m = {OS_MESSAGE_LEN, .flags = OS_NETLINK_FLAGS,
                         .command = (unsigned char)command, .version = 1};
  /* Attribute 1, which holds attribute 1, which holds the descriptor */
  uint16_t item[6] = {sizeof item, 1, sizeof item - 4, 1};
  uint16_t family = 0;
  int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, OS_NETLINK_GENERIC);
  if (fd < 0) return -errno;
  os_add_attribute(&ask, OS_FAMILY_NAME, "nbd", sizeof "nbd");
  int err = os_ask_kernel(fd, &ask, OS_FAMILY_ID, &family);
  m.type = family;
  os_add_attribute(&m, OS_NBD_INDEX, &index, sizeof index);
  /* Only here: when a device is taken over, the kernel would set them even if
   * its old server lives, and our socket is refused. */
  if (command == OS_NBD_CONNECT) {
    os_add_attribute(&m, OS_NBD_SIZE, &nbd->size, 8);
    os_add_attribute(&m, OS_NBD_BLOCK_SIZE, &nbd->block_size, 8);
    os_add_attribute(&m, OS_NBD_FLAGS, &nbd->flags, 8);
  }
  if (nbd) {
    memcpy(item + 4, &nbd->socket, 4);
    os_add_attribute(&m, OS_NBD_SOCKETS, item, sizeof item);
    os_add_attribute(&m, OS_NBD_PATIENCE, &nbd->patience, 8);
    os_add_attribute(&m, OS_NBD_BACKEND, nbd->owner, strlen(nbd->owner) + 1);
  }
  if (!err) err = os_ask_kernel(fd, &m, 0, &family);
  close(fd);
  return err;
}

/* Does the device have an owner?  Linux has noted that since 5.14, and lets
 * only a process that gives the same one reconfigure it.  A device without an
 * owner is not ours to take over. */
static int os_nbd_is_owned(uint32_t index) {
  char path[64];
  snprintf(path, sizeof path, "/sys/block/nbd%" PRIu32 "/backend", index);
  return access(path, F_OK) == 0;
}
#elif !NBDSERVE_NO_MAIN
/* This system does not do that, and has no such client. */
#define os_end_with_parent() (-EOPNOTSUPP)
#define os_nbd_is_owned(index) 0
#define os_serve_writeback() ((void)0)
#define os_tell_nbd(command, index, nbd) (-EOPNOTSUPP)
#endif

#if defined OS_LINUX && defined SYS_landlock_restrict_self && \
    !NBDSERVE_NO_SANDBOX && !NBDSERVE_NO_MAIN
/* The version of Landlock.  -ENOSYS, -EOPNOTSUPP: this system has none. */
static int os_sandbox_version(void) {
  int version = (int)syscall(SYS_landlock_create_ruleset, NULL, 0, 1);
  return version < 0 ? -errno : version;
}

/* Gives up, for this thread and those that it will start, what serving does not
 * need: to open, make, rename or run files and, since Linux 6.7, to bind or
 * connect TCP sockets.  What is open stays open, and files may be removed. */
static int os_sandbox(void) {
  /* LANDLOCK_ACCESS_FS_*: bits 0 to 12, but not to remove files and
   * directories; LANDLOCK_ACCESS_NET_*: bind and connect */
  const uint64_t denied[] = {0x1fcf, 3};
  int version = os_sandbox_version();
  if (version < 0) return version;
  int fd = (int)syscall(SYS_landlock_create_ruleset, denied,
                        version < 4 ? sizeof *denied : sizeof denied, 0);
  int fails = fd < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
              syscall(SYS_landlock_restrict_self, fd, 0) < 0;
  int err = fails ? -errno : 0;
  close(fd);
  return err;
}
#elif defined __OpenBSD__ && !NBDSERVE_POSIX_ONLY && !NBDSERVE_NO_SANDBOX && \
    !NBDSERVE_NO_MAIN
/* With pledge(2): compiled, but never run.  Weaker than Landlock: files may be
 * read, renamed and removed, and directories made.  rpath: lstat(2), by which
 * we know files to remove.  proc: to tell the command to end.  error: what else
 * we might call fails with ENOSYS, and does not end the process. */
#define os_sandbox_version() 0
#define os_sandbox() \
  (pledge("stdio rpath cpath inet unix recvfd proc error", NULL) ? -errno : 0)
#elif !NBDSERVE_NO_MAIN
/* FreeBSD's cap_enter(2) would let us neither remove our sockets nor end the
 * command. */
#define os_sandbox_version() (-EOPNOTSUPP)
#define os_sandbox() (-EOPNOTSUPP)
#endif

/* Opens the directory that path is in.  The path was opened, or fits into a
 * socket's address, so there is room for it.  A descriptor or -errno. */
static int os_open_dir(const char *path) {
  char dir[PATH_MAX];
  const char *slash = strrchr(path, '/');
  int n = slash ? (int)(slash - path) + 1 : 0;
  snprintf(dir, sizeof dir, "%.*s.", n, path);
  int fd = open(dir, O_RDONLY | O_CLOEXEC);
  return fd < 0 ? -errno : fd;
}

/* Removes the file at path if it still is the one that is described: in the
 * meantime somebody may have put another one there, which is not ours to
 * remove. */
static void os_remove_same(const char *path, const struct stat *own) {
  struct stat found;
  if (lstat(path, &found) < 0) return;
  if (own->st_dev == found.st_dev && own->st_ino == found.st_ino) unlink(path);
}

/* Takes the next client of a listening socket: a blocking socket, or -errno.  A
 * sandbox may refuse accept4(2). */
static int os_accept(int fd) {
#ifdef OS_LINUX
  int at_once = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
  if (at_once >= 0) return at_once;
  if (errno != ENOSYS && errno != EPERM) return -errno;
#endif
  int client = accept(fd, NULL, NULL);
  if (client < 0) return -errno;
  os_set_fd_flags(client, 0); /* BSDs copy flags */
  return client;
}

/* Sets a socket's option.  One that does not apply to fd fails, which does no
 * harm: that is why nobody looks at the result. */
static void os_set_option(int fd, int level, int option, int value) {
  setsockopt(fd, level, option, &value, sizeof value);
}

/* Prepares a client's socket.  All kinds: no SIGPIPE, and room for a long
 * reply, as far as the system allows, which is 3 times faster on Linux, 10 on
 * macOS.  TCP: no delay by Nagle's algorithm (proto.md, Protocol phases), and a
 * peer that has died is noticed within a minute: 30 s of silence, then three
 * questions, 10 s apart. */
static void os_setup_client(int fd) {
#ifdef SO_NOSIGPIPE
  os_set_option(fd, SOL_SOCKET, SO_NOSIGPIPE, 1);
#endif
  os_set_option(fd, SOL_SOCKET, SO_SNDBUF, 2 << 20);
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

#if defined OS_LINUX && defined SPLICE_F_NONBLOCK
/* Makes a pipe for os_splice, of what is to go to a socket: sending there waits
 * for a tenth of a second at most, as os_splice cannot be told not to wait.
 * Returns how many bytes the pipe holds, at most `most`, if each of its pages
 * is used as a whole; or -errno.  -EOPNOTSUPP: splice(2) raises SIGPIPE when
 * the peer is gone, and that would end the process: os_thread blocks it, but
 * without threads this one is the host's. */
static int os_splice_pipe(int fd[2], int most, int to) {
  static const struct timeval tenth = {.tv_usec = 100000};
  struct sigaction action;
  sigaction(SIGPIPE, NULL, &action);
  if (NBDSERVE_NO_THREADS && action.sa_handler != SIG_IGN) return -EOPNOTSUPP;
  if (setsockopt(to, SOL_SOCKET, SO_SNDTIMEO, &tenth, sizeof tenth) < 0 ||
      pipe2(fd, O_CLOEXEC) < 0)
    return -errno;
  fcntl(fd[1], F_SETPIPE_SZ, most); /* or it stays as it is */
  int size = fcntl(fd[1], F_GETPIPE_SZ);
  return size < most ? size : most;
}

/* Moves up to len bytes between a pipe and something else, without a copy of
 * them: what is changed in a file meanwhile changes on its way, too.  *off: of
 * the file that they come from; NULL: they come from the pipe.  As read(2).  It
 * never waits for the pipe, but maybe for the other side. */
#define os_splice(from, off, to, len) \
  splice(from, (loff_t *)(off), to, NULL, len, SPLICE_F_NONBLOCK)
#else
/* This system moves no data without a copy. */
#define os_splice_pipe(fd, most, to) ((void)(fd), -EOPNOTSUPP)
#define os_splice(from, off, to, len) ((void)(from), (void)(to), (ssize_t)-1)
#endif

/* Removes the first `done` bytes from the pieces (*v)[0..*n). */
static void os_advance(struct iovec **v, int *n, size_t done) {
  for (; *n > 0 && done >= (*v)->iov_len; ++*v, --*n)
    done -= (*v)->iov_len;
  if (!done) return;
  assert(*n > 0);
  (*v)->iov_base = (char *)(*v)->iov_base + done;
  (*v)->iov_len -= done;
}

#if !NBDSERVE_NO_FLAT || !NBDSERVE_NO_CAS
/* ---- Files and block devices: for [10] and [12] -------------------------
 * Offsets and lengths have 64 bits without a sign everywhere else; here they
 * become an off_t.  The caller makes sure that no range reaches beyond
 * INT64_MAX, and each function asserts that.  A descriptor stays the caller's.
 *
 * Calls that a signal interrupts go on: a host may have handlers without
 * SA_RESTART. */

/* What os_transfer does.  The boolean `writing` says OS_WRITE or OS_READ. */
enum {
  OS_READ = 0,
  OS_WRITE = 1,
  OS_READ_NOW = 2 /* reads if all of it is in memory: only if os_can_read_now */
};

#if !defined OS_LINUX && (defined __APPLE__ || NBDSERVE_POSIX_ONLY)
/* Where POSIX is all there is, one piece is moved at a time. */
#define preadv(fd, v, n, off) pread(fd, (v)->iov_base, (v)->iov_len, off)
#define pwritev(fd, v, n, off) pwrite(fd, (v)->iov_base, (v)->iov_len, off)
#endif

#if defined OS_LINUX && defined SYS_preadv2
/* Reads what is in memory, with RWF_NOWAIT (8).  Not every libc has preadv2(2).
 */
#define os_preadv_now(fd, v, n, off) \
  syscall(SYS_preadv2, fd, v, n, (long)(off), (long)((off) >> 32), 8)
#else
/* Here nobody can tell what is in memory. */
#define os_preadv_now(fd, v, n, off) (errno = EOPNOTSUPP, -1)
#endif

/* Moves what one system call moves of v[0..n); as pread(2) and pwrite(2).  For
 * a single piece the plain calls are faster: 15 % of a read of 512 bytes that
 * are in memory. */
static ssize_t os_move(int fd, int how, struct iovec *v, int n, off_t off) {
  int writing = how == OS_WRITE;
  if (how == OS_READ_NOW) return os_preadv_now(fd, v, n, off);
  if (n > 1) return writing ? pwritev(fd, v, n, off) : preadv(fd, v, n, off);
  return writing ? pwrite(fd, v->iov_base, v->iov_len, off)
                 : pread(fd, v->iov_base, v->iov_len, off);
}

#if defined POSIX_FADV_WILLNEED && !NBDSERVE_POSIX_ONLY
/* Tells the system what will be done with a range: POSIX_FADV_...  len 0: all
 * up to the end. */
static inline void os_advise(int fd, int advice, uint64_t off, uint64_t len) {
  assert(off <= INT64_MAX && len <= INT64_MAX - off);
  posix_fadvise(fd, (off_t)off, (off_t)len, advice);
}
#else
/* This system cannot be told. */
#define os_advise(fd, advice, off, len) ((void)(fd), (void)(off), (void)(len))
#endif

/* Reads or writes all of v[0..n), which lies at off in one piece.  Changes v.
 * No piece may be empty.
 *
 * The system may do less than it was asked to (at a signal, a full disk, or
 * after 2 GiB); what is left is asked for again until it is done or an error
 * tells why not.  After an error some of it may have been done.  -EIO: the file
 * ends before all was read.  -EAGAIN, of OS_READ_NOW only, and its only error:
 * the medium would have to be waited for, or asked what is wrong.  It is asked
 * for all of it, so whoever comes back waits less. */
static int os_transfer(int fd, int how, struct iovec *v, int n, uint64_t off) {
  assert(how == OS_READ || how == OS_WRITE || how == OS_READ_NOW);
  while (n > 0) {
    assert(v->iov_len > 0); /* else 0 would not mean the end of the file */
    assert(off <= INT64_MAX);
    ssize_t done = os_move(fd, how, v, n, (off_t)off);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0 && how == OS_READ_NOW) {
      uint64_t len = 0;
      for (; n > 0; n--)
        len += v++->iov_len;
      os_advise(fd, POSIX_FADV_WILLNEED, off, len);
      return -EAGAIN;
    }
    if (done < 0) return -errno;
    if (done == 0) return -EIO;
    off += (uint64_t)done;
    os_advance(&v, &n, (size_t)done);
  }
  return 0;
}

/* Does OS_READ_NOW work with a file?  A read of its first byte shows it, even
 * if there is none. */
static int os_can_read_now(int fd) {
  char byte;
  struct iovec v = {&byte, 1};
  return os_move(fd, OS_READ_NOW, &v, 1, 0) >= 0 || errno == EAGAIN;
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
  OS_ALLOCATE = 0,   /* has space, maybe with a larger file; keeps its data */
  OS_PUNCH_HOLE = 3, /* gives its space back; reads as zeroes; same size */
  OS_ZERO_RANGE = 17 /* reads as zeroes and has space; same size */
};

#ifdef OS_LINUX
/* Changes the space behind a range.  -EINVAL: not at these boundaries, as for a
 * part of a device's sector.  -EOPNOTSUPP: this kind of file (ENODEV), its file
 * system or a sandbox (EPERM or ENOSYS) does not have that. */
static int os_fallocate(int fd, int mode, uint64_t off, uint64_t len) {
  assert(mode >= 0 && mode <= OS_ZERO_RANGE);
  assert(len > 0 && off <= INT64_MAX && len <= INT64_MAX - off);
  while (fallocate(fd, mode, (off_t)off, (off_t)len) < 0) {
    if (errno == ENOSYS || errno == EPERM || errno == ENODEV)
      return -EOPNOTSUPP;
    if (errno != EINTR) return -errno;
  }
  return 0;
}

/* Asks for blocks of a new file to be overwritten in place, where the file
 * system (btrfs) would copy them: FS_IOC_SETFLAGS, FS_NOCOW_FL.  Others do not
 * know it. */
static inline void os_set_nocow(int fd) {
  long flags = 0;
  if (ioctl(fd, _IOR('f', 1, long), &flags) < 0) return;
  flags |= 0x00800000;
  ioctl(fd, _IOW('f', 2, long), &flags);
}

/* Puts a question to a block device: a BLK* of <linux/fs.h>, which not every
 * libc comes with.  A file knows no answer, which means no.  Some answers fill
 * only the first half of `yes`. */
static int os_ask_device(int fd, unsigned question) {
  int yes = 0;
  return ioctl(fd, question, &yes) == 0 && yes;
}
#else
/* On other systems nothing keeps all promises of os_fallocate, and there is
 * nobody to ask. */
#define os_fallocate(fd, mode, off, len) ((void)(off), (void)(len), -EOPNOTSUPP)
#define os_set_nocow(fd) ((void)(fd))
#define os_ask_device(fd, question) ((void)(fd), 0)
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

/* Removes the file at path if fd is that file. */
static void os_remove_own_file(const char *path, int fd) {
  struct stat own;
  if (fstat(fd, &own) == 0) os_remove_same(path, &own);
}

/* BLKROGET: does the device refuse writes?  Linux opens such a device for
 * writing nevertheless; elsewhere opening it must tell. */
#define os_is_readonly_device(fd) os_ask_device(fd, _IO(0x12, 94))

/* BLKROTATIONAL: does the device have a head to move? */
#define os_is_rotational(fd) os_ask_device(fd, _IO(0x12, 126))

#if defined SEEK_HOLE && !NBDSERVE_POSIX_ONLY
/* Returns 1 if there is data at off, and 0 if there is a hole, which reads as
 * zeroes.  *next: where the data or the hole ends, at most end.
 *
 * When in doubt it is data: clients skip what they are told is a hole, so a
 * hole that is called data costs time, and data that is called a hole is lost.
 * Other threads may change the file in between; each answer was true once. */
static inline int os_is_data(int fd, uint64_t off, uint64_t end,
                             uint64_t *next) {
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

#if !NBDSERVE_NO_FLAT
/* Opens a private file that is gone when it is closed: in dir or, if dir is
 * NULL, in memory, or in /tmp where the system has no files in memory.
 * The caller owns the descriptor.
 *
 * The ways are tried from the best to the one that works everywhere, without a
 * look at why one has failed.  -errno: of the last one. */
static int os_nameless_file(const char *dir) {
  char path[PATH_MAX];
#if defined OS_LINUX && defined MFD_CLOEXEC && defined O_TMPFILE
  /* O_EXCL lets nobody give it a name.  Not every file system has that. */
  int made = dir ? open(dir, O_TMPFILE | O_EXCL | O_RDWR | O_CLOEXEC, 0600)
                 : memfd_create("nbdserve", MFD_CLOEXEC);
  if (made >= 0) return made;
#endif
  if (!dir) dir = "/tmp";
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
#endif /* !NBDSERVE_NO_FLAT */
#endif /* !NBDSERVE_NO_FLAT || !NBDSERVE_NO_CAS */

/* ==== [3] UTIL (u_) ======================================================
 * Bytes of network and disk go through u_get and u_put: they are big-endian
 * there and lie at any address, so no struct is ever laid over them.
 *
 * The text of a -errno value comes from strerror, which returns a constant for
 * every number that the system knows; only for others does it use memory that
 * threads share. */

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
  for (; n >= sizeof v; p += sizeof v, n -= sizeof v) {
    memcpy(v, p, sizeof v);
    if (v[0] | v[1] | v[2] | v[3]) return 0;
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
  char *p;
  uint64_t v = strtoull(s, &p, 10); /* what is too large: its largest value */
  const char *unit = *p ? strchr(units, *p) : NULL;
  int shift = unit ? (int)((unit - units) % 6 + 1) * 10 : 0;
  if (*s < '0' || *s > '9') return NULL; /* blanks and signs are no digits */
  if (v > (uint64_t)INT64_MAX >> shift) return NULL;
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

/* Appends s to the text in buf[size]; what a URI may not hold as it is (RFC
 * 3986, 2.3, and the slash) becomes %XX.  Returns false if there is no room;
 * buf then holds a part of it.  No isalnum here: that asks the host's
 * locale. */
static int u_append_uri(char *buf, size_t size, const char *s) {
  static const char plain[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ-._~/"
                              "abcdefghijklmnopqrstuvwxyz0123456789";
  size_t n = strlen(buf);
  assert(n < size);
  for (; *s && n < size; s++) {
    const char *const format = strchr(plain, *s) ? "%c" : "%%%02X";
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
 * memory in the order that makes the two halves of it the registers which the
 * instructions want: ABEF and CDGH, A and C as the highest words; on ARM ABCD
 * and EFGH, A and E as the lowest. */
#if !NBDSERVE_NO_CAS

enum {
  SHA_BLOCK_LEN = 64,  /* bytes that are mixed into the state at a time */
  SHA_ROUNDS = 64,     /* rounds for each block */
  SHA_STATE_WORDS = 8, /* in the order of sha_place */
  SHA_COUNT_LEN = 8    /* bytes at a message's end that hold its length */
};

/* Where each word of a state lies, A to H */
static const unsigned char sha_place[SHA_STATE_WORDS] = {OS_SHA_ORDER};

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

/* One round on the state v, whose words lie in the order A to H.  The standard
 * moves every word one place on after each round; here the words stay where
 * they are, and the next round names them differently instead.  addend: the
 * constant plus the message's word. */
static inline void sha_round(uint32_t *v, int round, uint32_t addend) {
#define SHA_WORD(n) v[((n) + 8 - round) & 7]
  uint32_t sum = SHA_WORD(7) + SHA_BIG_SIGMA1(SHA_WORD(4)) + addend +
                 SHA_CHOOSE(SHA_WORD(4), SHA_WORD(5), SHA_WORD(6));
  SHA_WORD(3) += sum;
  SHA_WORD(7) = sum + SHA_BIG_SIGMA0(SHA_WORD(0)) +
                SHA_MAJORITY(SHA_WORD(0), SHA_WORD(1), SHA_WORD(2));
}

/* Mixes nblocks blocks into a state, in plain C.  The rounds for a block take a
 * word each: the first 16 are the block, big-endian; every other one is made of
 * four before it.  A copy of the state goes through all rounds and is then
 * added to the state. */
static void sha_portable(uint32_t *state, const unsigned char *blocks,
                         size_t nblocks) {
  uint32_t w[SHA_ROUNDS];
  uint32_t v[SHA_STATE_WORDS];
  for (; nblocks > 0; nblocks--, blocks += SHA_BLOCK_LEN) {
    for (int i = 0; i < 16; i++)
      w[i] = u_get32(blocks + 4 * i);
    for (int i = 16; i < SHA_ROUNDS; i++)
      w[i] =
          SHA_SIGMA1(w[i - 2]) + w[i - 7] + SHA_SIGMA0(w[i - 15]) + w[i - 16];
    for (int i = 0; i < SHA_STATE_WORDS; i++)
      v[i] = state[sha_place[i]];
    /* Unrolled, so that v lies in registers. */
    for (int i = 0; i < SHA_ROUNDS; i += 8)
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++)
        sha_round(v, j, sha_k[i + j] + w[i + j]);
    for (int i = 0; i < SHA_STATE_WORDS; i++)
      state[sha_place[i]] += v[i];
  }
}

#ifdef OS_HWSHA
/* One of the two messages that the instructions work on.  All of it can
 * stay in registers: two lanes, the constants and what is in between fit into
 * the 16 that the processor has, or 32. */
struct sha_lane {
  os_words abef; /* half of the state; on ARM its words are A, B, C, D, */
  os_words cdgh; /* the other half; E, F, G, H */
  os_words w[4]; /* 16 words of the message's schedule, the next ones first */
};

/* Does four rounds, k being their constants.  more: also computes the four
 * words of the schedule for the rounds that come 16 later. */
static inline OS_HWSHA void sha_lane_rounds(struct sha_lane *lane, os_words k,
                                            int more) {
  os_words *w = lane->w;
  os_rounds(&lane->abef, &lane->cdgh, os_add_words(w[0], k));
  os_words next = more ? os_next_words(w) : w[0];
  w[0] = w[1];
  w[1] = w[2];
  w[2] = w[3];
  w[3] = next;
}

/* Loads four words from anywhere. */
static inline OS_HWSHA os_words sha_load(const void *from) {
  os_words v;
  memcpy(&v, from, sizeof v);
  return v;
}

/* Loads a state, and a block of the message, whose words are big-endian.  There
 * is no loop because gcc would keep an array that a loop indexes in memory. */
static inline OS_HWSHA void sha_lane_load(struct sha_lane *lane,
                                          const uint32_t *state,
                                          const unsigned char *block) {
  lane->abef = sha_load(state);
  lane->cdgh = sha_load(state + 4);
  lane->w[0] = os_swap_words(sha_load(block));
  lane->w[1] = os_swap_words(sha_load(block + 16));
  lane->w[2] = os_swap_words(sha_load(block + 32));
  lane->w[3] = os_swap_words(sha_load(block + 48));
}

/* Adds what the rounds made of a state to it. */
static inline OS_HWSHA void sha_lane_save(const struct sha_lane *lane,
                                          uint32_t *state) {
  os_words abef = os_add_words(lane->abef, sha_load(state));
  os_words cdgh = os_add_words(lane->cdgh, sha_load(state + 4));
  memcpy(state, &abef, sizeof abef);
  memcpy(state + 4, &cdgh, sizeof cdgh);
}

/* Mixes nblocks blocks of each message into its state, with the instructions.
 * The lines for the two lanes alternate, and the compiler keeps that order more
 * or less: so there is always one that need not wait for the one before. */
static OS_HWSHA void sha_hw(uint32_t state[2][SHA_STATE_WORDS],
                            const unsigned char *first,
                            const unsigned char *second, size_t nblocks) {
  struct sha_lane lane;
  struct sha_lane other;
  for (size_t i = 0; i < nblocks; i++) {
    sha_lane_load(&lane, state[0], first + SHA_BLOCK_LEN * i);
    sha_lane_load(&other, state[1], second + SHA_BLOCK_LEN * i);
    /* Unrolled, so that the last 16 rounds compute no more words. */
#pragma GCC unroll 16
    for (int round = 0; round < SHA_ROUNDS; round += 4) {
      os_words k = sha_load(sha_k + round);
      sha_lane_rounds(&lane, k, round < SHA_ROUNDS - 16);
      sha_lane_rounds(&other, k, round < SHA_ROUNDS - 16);
    }
    sha_lane_save(&lane, state[0]);
    sha_lane_save(&other, state[1]);
  }
}

#else
#define sha_hw(state, first, second, nblocks) assert(0)
#endif

/* Mixes nblocks blocks of a message into state[0] and, if second is not NULL,
 * those of another one into state[1].  The instructions (use_hw) always work on
 * two: a single message keeps itself company, and nobody looks at state[1]. */
static void sha_mix(int use_hw, uint32_t state[2][SHA_STATE_WORDS],
                    const unsigned char *first, const unsigned char *second,
                    size_t nblocks) {
  if (use_hw) sha_hw(state, first, second ? second : first, nblocks);
  if (!use_hw) sha_portable(state[0], first, nblocks);
  if (!use_hw && second) sha_portable(state[1], second, nblocks);
}

/* The state before a message, twice */
static void sha_begin(uint32_t state[2][SHA_STATE_WORDS]) {
  static const uint32_t start[SHA_STATE_WORDS] = {
      0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  for (int i = 0; i < SHA_STATE_WORDS; i++)
    state[0][sha_place[i]] = state[1][sha_place[i]] = start[i];
}

/* Writes the digest of a message, or those of two of the same length, whose
 * whole blocks are in the state already; first and second are what is left.
 * Behind that comes, in one more block or two:
 *
 *   the rest of the message, 0 to 63 bytes
 *   the byte 0x80
 *   zeroes, as few as it takes to fill the last block
 *   the length of the whole message in bits, 8 bytes
 *
 * len: of a whole message.  second: NULL if there is only one. */
static void sha_end(int use_hw, uint32_t state[2][SHA_STATE_WORDS],
                    const unsigned char *first, const unsigned char *second,
                    size_t len, unsigned char *first_digest,
                    unsigned char *second_digest) {
  const unsigned char *const rest[2] = {first, second};
  unsigned char *const digest[2] = {first_digest, second_digest};
  unsigned char tail[2][2 * SHA_BLOCK_LEN] = {{0}};
  size_t n = len % SHA_BLOCK_LEN;
  size_t nblocks = n + 1 + SHA_COUNT_LEN <= SHA_BLOCK_LEN ? 1 : 2;
  size_t count_at = SHA_BLOCK_LEN * nblocks - SHA_COUNT_LEN;
  assert(n < count_at && count_at <= sizeof *tail - SHA_COUNT_LEN);
  for (int i = 0; i < 2 && rest[i]; i++) {
    memcpy(tail[i], rest[i], n);
    tail[i][n] = 0x80;
    u_put64(tail[i] + count_at, (uint64_t)len * 8);
  }
  sha_mix(use_hw, state, tail[0], second ? tail[1] : NULL, nblocks);
  for (int i = 0; i < 2 && rest[i]; i++)
    for (int j = 0; j < SHA_STATE_WORDS; j++)
      u_put32(digest[i] + 4 * j, state[i][sha_place[j]]);
}

/* Writes the digest of first[len] to first_digest and, if second is not NULL,
 * the digest of second[len] to second_digest.  A digest may be written over its
 * own message.  use_hw: use the processor's instructions; only where
 * os_has_hwsha. */
static void sha_256(int use_hw, const unsigned char *first,
                    const unsigned char *second, size_t len,
                    unsigned char *first_digest, unsigned char *second_digest) {
  uint32_t state[2][SHA_STATE_WORDS];
  size_t whole = len - len % SHA_BLOCK_LEN;
  assert(first && first_digest);
  assert(second_digest || !second);
  sha_begin(state);
  sha_mix(use_hw, state, first, second, whole / SHA_BLOCK_LEN);
  sha_end(use_hw, state, first + whole, second ? second + whole : NULL, len,
          first_digest, second_digest);
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

/* The numbers of the handshake.  Those of error replies stand below. */
enum nbd_handshake {
  /* proto.md, Handshake flags, of the server, and Client flags */
  NBD_FLAG_FIXED_NEWSTYLE = 1 << 0, /* NBD_FLAG_C_... is the same */
  NBD_FLAG_NO_ZEROES = 1 << 1,

  /* proto.md, Option types.  4 (PEEK_EXPORT) was withdrawn; 5 (STARTTLS) is
   * answered as an unknown option. */
  NBD_OPT_EXPORT_NAME = 1,
  NBD_OPT_ABORT = 2,
  NBD_OPT_LIST = 3,
  NBD_OPT_INFO = 6,
  NBD_OPT_GO = 7,
  NBD_OPT_STRUCTURED_REPLY = 8,
  NBD_OPT_LIST_META_CONTEXT = 9,
  NBD_OPT_SET_META_CONTEXT = 10,
  NBD_OPT_EXTENDED_HEADERS = 11,

  /* proto.md, Option reply types */
  NBD_REP_ACK = 1,
  NBD_REP_SERVER = 2,
  NBD_REP_INFO = 3,
  NBD_REP_META_CONTEXT = 4,

  /* proto.md, NBD_OPT_INFO and NBD_OPT_GO: types of information */
  NBD_INFO_EXPORT = 0,
  NBD_INFO_NAME = 1,
  NBD_INFO_DESCRIPTION = 2,
  NBD_INFO_BLOCK_SIZE = 3
};

/* proto.md, Option reply types, errors: bit 31 is set, which an enum of C99
 * need not be able to hold. */
#define NBD_REP_ERR_BIT 0x80000000u
#define NBD_REP_ERR_UNSUP 0x80000001u
#define NBD_REP_ERR_INVALID 0x80000003u
#define NBD_REP_ERR_UNKNOWN 0x80000006u
#define NBD_REP_ERR_BLOCK_SIZE_REQD 0x80000008u
#define NBD_REP_ERR_TOO_BIG 0x80000009u
#define NBD_REP_ERR_EXT_HEADER_REQD 0x8000000au

/* The numbers of transmission, but for commands and types of replies */
enum nbd_transmission {
  /* proto.md, Transmission flags */
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
  NBD_FLAG_BLOCK_STATUS_PAYLOAD = 1 << 12,

  /* proto.md, Transmission phase: first word of a request or reply */
  NBD_REQUEST_MAGIC = 0x25609513,
  NBD_EXTENDED_REQUEST_MAGIC = 0x21e41c71,
  NBD_SIMPLE_REPLY_MAGIC = 0x67446698,
  NBD_STRUCTURED_REPLY_MAGIC = 0x668e33ef,
  NBD_EXTENDED_REPLY_MAGIC = 0x6e8a278c,

  /* proto.md, Command flags */
  NBD_CMD_FLAG_FUA = 1 << 0,
  NBD_CMD_FLAG_NO_HOLE = 1 << 1,
  NBD_CMD_FLAG_DF = 1 << 2,
  NBD_CMD_FLAG_REQ_ONE = 1 << 3,
  NBD_CMD_FLAG_FAST_ZERO = 1 << 4,
  NBD_CMD_FLAG_PAYLOAD_LEN = 1 << 5
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

/* A backend's flags are the client's, bit for bit: ex_execute masks them. */
STATIC_ASSERT(same_fua, NBDSERVE_CMD_FUA == NBD_CMD_FLAG_FUA);
STATIC_ASSERT(same_no_hole, NBDSERVE_CMD_NO_HOLE == NBD_CMD_FLAG_NO_HOLE);
STATIC_ASSERT(same_req_one, NBDSERVE_CMD_REQ_ONE == NBD_CMD_FLAG_REQ_ONE);
STATIC_ASSERT(same_fast_zero, NBDSERVE_CMD_FAST_ZERO == NBD_CMD_FLAG_FAST_ZERO);

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

/* ---- Sizes and limits --------------------------------------------------- */

enum {
  WIRE_STRING_MAX = 4096, /* bytes of a name or text (proto.md, Values) */
  WIRE_OPTION_REPLY_LEN = 20,
  WIRE_REQUEST_LEN = 28,
  WIRE_EXT_REQUEST_LEN = 32,
  WIRE_SIMPLE_REPLY_LEN = 16,
  WIRE_CHUNK_LEN = 20,      /* head of a chunk of a structured reply */
  WIRE_EXT_CHUNK_LEN = 32,  /* the same with extended headers */
  WIRE_OFFSET_LEN = 8,      /* in front of a chunk's data */
  WIRE_ERROR_LEN = 6,       /* in front of an error's text */
  WIRE_EXT_EXTENT_LEN = 16, /* of BLOCK_STATUS_EXT; BLOCK_STATUS: half of it */
  WIRE_CONTEXTS = 17        /* base:allocation and 16 others, at most */
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
 *                       16    2 NBD_FLAG_FIXED_NEWSTYLE ...
 *   option               0    8 NBD_OPTION_MAGIC
 *                        8    4 NBD_OPT_...
 *                       12    4 length of the data behind it
 *   reply to one         0    8 NBD_REP_MAGIC
 *                        8    4 the option that is answered
 *                       12    4 NBD_REP_..., or NBD_REP_ERR_...
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

/* The metadata contexts that a client has selected.  An export numbers those
 * that it has: base:allocation is 0.  To the client each is known by the id of
 * wire_context_id. */
struct wire_contexts {
  unsigned n;
  uint32_t number[WIRE_CONTEXTS];
};

/* The id of a context: not 0, which some clients take for none. */
static uint32_t wire_context_id(uint32_t number) {
  return number + 1;
}

/* The life of a request:
 *
 *   state         set by                              what comes next
 *   TODO          tx_next_request                     TO_FLUSH, HANDED_OVER,
 *                                                     DONE
 *   TO_FLUSH      tx_next_request, for a FLUSH;       HANDED_OVER, DONE
 *                 tx_executed, for a write with FUA
 *   HANDED_OVER   tx_hand_over: a worker has a copy,  nothing: this one is dead
 *                 in the state that this one had;
 *                 tx_run_batch: it was answered
 *   DONE          tx_refuse; tx_next_request, if      it is answered
 *                 there is nothing to do; tx_executed;
 *                 tx_execute
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
  uint16_t flags;      /* NBD_CMD_FLAG_... */
  enum wire_mode mode; /* the form of the reply */
  uint64_t cookie;     /* goes back as it came */
  uint64_t client_off; /* offset of the client's request */
  uint64_t off;        /* offset of this piece; the same if it is whole */
  uint64_t len;        /* bytes of this piece */
  uint64_t payload;    /* bytes that follow the client's head */
  uint64_t begun_ns;   /* in os_now_ns: when it was taken up; or 0 */
  const struct wire_contexts *contexts; /* BLOCK_STATUS: that are selected */
  uint32_t asked; /* BLOCK_STATUS: a bit for each of these that is asked for */
  /* -- its data */
  unsigned char *buf; /* READ: room for it, behind room for the reply's head,
                         or NULL: it is in the client's pipe; WRITE: it;
                         BLOCK_STATUS: chunks as they are sent */
  int may_wait;       /* READ: for the medium; if 0, -EAGAIN instead */
  size_t data_len;    /* bytes at buf that follow the head of the reply; of a
                         READ that was done 0: only zeroes were read */
  void *owned;        /* the memory that buf lies in, which is freed with the
                         request; NULL: it is the client's thread's */
  /* -- the outcome */
  enum req_state state;
  int err;                   /* 0 or -errno */
  const char *refused;       /* why tx_validate refused it, else NULL */
  int more_chunks;           /* another chunk of this reply follows */
  int err_has_off;           /* err_off is valid */
  uint64_t err_off;          /* where in the export err happened */
  struct nbdserve_req *next; /* in a list of requests that are answered, or
                                that one worker does */
  struct nbdserve_req
      *next_job; /* the first of the next such list in a queue */
};

/* Moves a request on in the table above. */
static void req_set_state(struct nbdserve_req *r, enum req_state to) {
  assert(r->state == REQ_TODO || r->state == REQ_TO_FLUSH);
  assert(to > r->state);
  r->state = to;
}

/* ---- Replies (proto.md, Simple reply message, Structured reply chunk message,
 * Extended reply chunk message, Structured reply types)
 *
 *   simple reply    OFFSET SIZE FIELD          a READ's data follows
 *                        0    4 magic
 *                        4    4 error, 0: done
 *                        8    8 cookie
 *   chunk                0    4 magic          extended chunk
 *                        4    2 1: it is the last       4    2 the same
 *                        6    2 enum nbd_reply_type     6    2 the same
 *                        8    8 cookie                  8    8 cookie
 *                       16    4 length                 16    8 offset of the
 *                                                              request
 *                                                      24    8 length
 *   payload of OFFSET_DATA      0    8 offset, and the data
 *   payload of OFFSET_HOLE      0    8 offset
 *                               8    4 length
 *   payload of ERROR            0    4 error
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
  assert(r->mode != MODE_SIMPLE && (extended || len <= UINT32_MAX));
  u_put32(p, extended ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC);
  u_put16(p + 4, r->err || !r->more_chunks); /* NBD_REPLY_FLAG_DONE */
  u_put16(p + 6, type);
  u_put64(p + 8, r->cookie);
  u_put32(p + 16, (uint32_t)len);
  if (!extended) return;
  u_put64(p + 16, r->client_off); /* in its place */
  u_put64(p + 24, len);
}

/* ---- Commands and errors ------------------------------------------------ */

/* What is true of each command: validation and dispatch read it here. */
static const struct wire_cmd {
  const char *name;
  uint16_t flags;      /* that it may carry, besides FUA, which any may, and
                     PAYLOAD_LEN */
  uint16_t exposed_by; /* transmission flag that offers it; 0: always there */
  uint8_t writes;      /* refused on a read-only export */
  int err_beyond;      /* -errno of a range beyond the end (proto.md); 0:
                          offset and length mean nothing */
} wire_cmds[] = {
#define WIRE_CMD(cmd, ...) [cmd] = {.name = #cmd, __VA_ARGS__}
    /* clang-format off */
    WIRE_CMD(NBD_CMD_READ, .flags = NBD_CMD_FLAG_DF, .err_beyond = -EINVAL),
    WIRE_CMD(NBD_CMD_WRITE, .writes = 1, .err_beyond = -ENOSPC),
    WIRE_CMD(NBD_CMD_DISC, .writes = 0),
    WIRE_CMD(NBD_CMD_FLUSH, .exposed_by = NBD_FLAG_SEND_FLUSH),
    WIRE_CMD(NBD_CMD_TRIM, .writes = 1, .exposed_by = NBD_FLAG_SEND_TRIM,
        .err_beyond = -EINVAL),
    WIRE_CMD(NBD_CMD_CACHE, .exposed_by = NBD_FLAG_SEND_CACHE,
        .err_beyond = -EINVAL),
    WIRE_CMD(NBD_CMD_WRITE_ZEROES, .writes = 1,
        .flags = NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
        .exposed_by = NBD_FLAG_SEND_WRITE_ZEROES, .err_beyond = -ENOSPC),
    WIRE_CMD(NBD_CMD_BLOCK_STATUS, .flags = NBD_CMD_FLAG_REQ_ONE,
        .err_beyond = -EINVAL),
    /* clang-format on */
};

/* What is known of a command, or NULL: its number comes from a client. */
static const struct wire_cmd *wire_cmd(unsigned type) {
  return type < COUNT_OF(wire_cmds) ? &wire_cmds[type] : NULL;
}

/* Is it a READ or a WRITE that moves at least one byte?  These have a buffer of
 * len bytes. */
static int req_moves_data(const struct nbdserve_req *r) {
  return (r->type == NBD_CMD_READ || r->type == NBD_CMD_WRITE) && r->len > 0;
}

/* The error that is sent for a request (proto.md, Error values): no other
 * number is ever sent. */
static uint32_t wire_error(const struct nbdserve_req *r) {
  static const struct {
    int host;
    uint32_t nbd;
  } errors[] = {
      {0, 0},       {EPERM, 1},    {EACCES, 1},     {EROFS, 1},
      {ENOMEM, 12}, {EINVAL, 22},  {ENOSPC, 28},    {EDQUOT, 28},
      {EFBIG, 28},  {ENOTSUP, 95}, {EOVERFLOW, 75}, {ESHUTDOWN, 108},
  };
  assert(r->err <= 0);
  /* proto.md: ENOTSUP is an answer to FAST_ZERO only. */
  int is_stray = r->err == -ENOTSUP && !(r->flags & NBD_CMD_FLAG_FAST_ZERO);
  int err = is_stray ? EINVAL : -r->err;
  for (size_t i = 0; i < COUNT_OF(errors); i++)
    if (errors[i].host == err) return errors[i].nbd;
  return 5; /* EIO */
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
 * Connections differ in how they wait for a request and learn that the server
 * stops:
 *
 *   kind            waits in   is told to stop by
 *   unix socket of  recv()     shutdown(SHUT_RD) in srv_finish
 *   a listener
 *   TCP socket of   poll()     the stop pipe: with SHUT_RD, what a peer still
 *   a listener                 sends would reset the connection
 *   nbdserve_serve  poll()     the stop pipe: it is the caller's socket, or a
 *                              pipe
 *
 * With NO_THREADS all are of the last kind: nobody could shut one down.  During
 * the handshake all of them wait in poll(), for the deadline.  Sending waits
 * in poll(), for the time in total, and never in the kernel, but for a tenth of
 * a second for spliced data. */

enum {
  IO_GRACE_MS = 5000, /* from nbdserve_stop on, for what is under way */
  IO_UNIT = 1 << 20   /* bytes that must move within stall_ms */
};

struct io {
  /* -- fixed */
  int in;   /* socket or pipe that the client's bytes come from */
  int out;  /* the same, or another one, that replies go to */
  int stop; /* how the server says that it stops: readable from nbdserve_stop
               on, for good; first comes when that was, by os_now_ms */
  int lifeline; /* that is readable when this client alone is to end; 0: none */
  int64_t stall_ms; /* (I2) */
  int polls;        /* wait in poll() for a request, not in recv() */
  /* -- written in the handshake, then 0 */
  int64_t deadline; /* in os_now_ms; 0: none */
  /* -- the client's thread only */
  int stopping;        /* this thread has seen that the server stops */
  size_t arrived_left; /* bytes that had arrived by then and are still to be
                          received */
};

/* When the grace of a server that stops is over (I3). */
static int64_t io_grace_end(int stop) {
  int64_t stopped;
  ssize_t n = recv(stop, &stopped, sizeof stopped, MSG_PEEK | MSG_DONTWAIT);
  return (n == sizeof stopped ? stopped : os_now_ms()) + IO_GRACE_MS;
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
  int64_t now = os_now_ms();
  return until < now ? 0 : (int)u_min((uint64_t)(until - now), INT_MAX);
}

/* Waits for a descriptor, `slice` milliseconds at most.  1: it is ready for the
 * events; 0: it is not, or *stops has become 1: the server stops, or this
 * client is to end; once it is 1, nobody looks there any more.  -ETIMEDOUT: the
 * time `until` is over (0: without limit).  Or another -errno. */
static int io_wait(const struct io *io, int fd, short events, int64_t until,
                   int slice, int *stops) {
  /* poll() skips a descriptor that is -1.  Of a pipe for replies it says when
   * nobody reads it any more. */
  struct pollfd p[] = {
      {.fd = fd, .events = events},
      {.fd = *stops ? -1 : io->stop, .events = POLLIN},
      {.fd = *stops || !io->lifeline ? -1 : io->lifeline, .events = POLLIN},
      {.fd = io->out == io->in ? -1 : io->out, .events = 0}};
  int timeout = until ? io_timeout(until) : -1;
  if (timeout == 0) return -ETIMEDOUT; /* even if it is ready */
  if (poll(p, COUNT_OF(p), timeout < slice ? timeout : slice) < 0)
    return errno == EINTR ? 0 : -errno;
  /* Of a socket it says POLLHUP; then what has come in is still taken. */
  if (p[3].revents & POLLERR || (p[3].revents && !p[0].revents)) return -EPIPE;
  if (p[1].revents || p[2].revents) *stops = 1;
  return p[0].revents && !*stops;
}

/* Waits until there is something to receive.  -ETIMEDOUT: not until the time
 * `until` (0: without limit).  -ESHUTDOWN: all that had arrived when the server
 * stopped has been taken. */
static int io_wait_input(struct io *io, int64_t until) {
  while (!io->stopping) {
    int r = io_wait(io, io->in, POLLIN, until, INT_MAX, &io->stopping);
    if (r) return r < 0 ? r : 0;
    int arrived = 0; /* until now: all that is still taken (I3) */
    if (io->stopping && ioctl(io->in, FIONREAD, &arrived) == 0 && arrived > 0)
      io->arrived_left = (size_t)arrived;
  }
  return io->arrived_left > 0 ? 0 : -ESHUTDOWN;
}

/* Waits until a descriptor is ready for the events, or it is worth a try.
 * -ETIMEDOUT: not until the time `until`, or the end of the grace.
 *
 * Some systems call a socket ready to send only when most of its buffer is
 * empty, which can be megabytes.  So that a peer which takes enough in time is
 * not cut off meanwhile, the wait ends without that after an eighth of
 * stall_ms. */
static int io_wait_ready(const struct io *io, int fd, short events,
                         int64_t until) {
  int slice = (int)u_min((uint64_t)io->stall_ms / 8 + 1, INT_MAX);
  int stops = 0;
  int r = io_wait(io, fd, events, until, slice, &stops);
  if (stops) {
    int64_t end = io_grace_end(io->stop);
    r = io_wait(io, fd, events, end < until ? end : until, slice, &stops);
  }
  return r < 0 ? r : 0;
}

/* Receives at least `least` bytes, and up to `most`: if these are the same, the
 * data of something, else requests, of which the next one lacks that many
 * bytes.  Returns their number.  0: the stream ends before.  -ETIMEDOUT: they
 * take too long in total (I2), or an idle client says nothing for stall_ms.  Or
 * -errno. */
static ssize_t io_recv(struct io *io, unsigned char *p, size_t least,
                       size_t most) {
  /* Only the first byte of a request is waited for in recv(), without limit. */
  int polls = io->polls || least > 1 || most == 1 || io->deadline;
  int64_t until = io_until(io, least);
  size_t got = 0;
  assert(least > 0 && least <= most);
  while (got < least) {
    int err = polls || io->stopping ? io_wait_input(io, until) : 0;
    if (err) return err;
    size_t room = most - got;
    if (io->stopping) room = (size_t)u_min(room, io->arrived_left);
    ssize_t n = recv(io->in, p + got, room, polls ? MSG_DONTWAIT : 0);
    if (n < 0 && errno == ENOTSOCK) n = read(io->in, p + got, room);
    int nothing = n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
    if (n == 0) return 0;
    if (n < 0 && !nothing && errno != EINTR) return -errno;
    if (nothing) io->arrived_left = 0; /* or another reader was faster */
    if (n > 0) got += (size_t)n;
    if (n > 0 && io->stopping) io->arrived_left -= (size_t)n;
    if (got < least && os_now_ms() >= until) return -ETIMEDOUT;
  }
  return (ssize_t)got;
}

/* Receives exactly len bytes.  0, -EPIPE: the stream ends before, or -errno. */
static int io_recv_all(struct io *io, unsigned char *p, size_t len) {
  ssize_t n = len ? io_recv(io, p, len, len) : 1;
  if (n > 0) return 0;
  return n ? (int)n : -EPIPE;
}

/* Sends all of v[0..n), which it uses up, and behind it `spliced` bytes that a
 * pipe holds.  0, -ETIMEDOUT when the peer takes too long in total (I2), or
 * -errno.  Where os_splice waits in the kernel, that ends by the time limit of
 * os_splice_pipe. */
static int io_send(const struct io *io, struct iovec *v, int n, int pipe,
                   size_t spliced) {
  int flags = MSG_DONTWAIT | MSG_NOSIGNAL | (spliced ? MSG_MORE : 0);
  size_t total = spliced;
  for (int i = 0; i < n; i++)
    total += v[i].iov_len;
  /* Else it is fixed when the peer first makes us wait. */
  int64_t until = spliced ? io_until(io, total) : 0;
  while (n > 0 || spliced > 0) {
    if (until && os_now_ms() >= until) return -ETIMEDOUT;
    struct msghdr m = {.msg_iov = v, .msg_iovlen = (unsigned)n};
    ssize_t done = n > 0 ? sendmsg(io->out, &m, flags)
                         : os_splice(pipe, NULL, io->out, spliced);
    if (done < 0 && errno == ENOTSOCK) {
      /* A pipe takes PIPE_BUF bytes without waiting if poll() says so. */
      struct pollfd p = {.fd = io->out, .events = POLLOUT};
      size_t len = (size_t)u_min(v->iov_len, PIPE_BUF);
      errno = EAGAIN;
      if (poll(&p, 1, 0) > 0) done = write(io->out, v->iov_base, len);
    }
    assert(done <= (ssize_t)total);
    if (done >= 0 && n == 0) spliced -= (size_t)done;
    if (done >= 0 && n > 0) os_advance(&v, &n, (size_t)done);
    if (done >= 0 || errno == EINTR) continue;
    if (errno != EAGAIN && errno != EWOULDBLOCK) return -errno;
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
  if (shutdown(io->out, SHUT_WR) < 0) return;
  while (io_wait_ready(io, io->in, POLLIN, until) == 0) {
    ssize_t n = recv(io->in, waste, sizeof waste, MSG_DONTWAIT);
    int again = errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
    if (n == 0 || (n < 0 && !again)) return;
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
  EX_ALL_FLAGS = 2 * NBDSERVE_EXPORT_UNSAFE - 1, /* that is the last one */
  EX_DEFAULT_BLOCK = 4096,   /* the same: what clients take for granted, */
  EX_DEFAULT_MAX = 32 << 20, /* and here */
  EX_EXTENTS = 128 << 10,    /* in one reply, at most: 2 MiB */
  EX_LOGGED = 10, /* messages about a host's wrong results, and for each client
                     about requests that failed: no flood */
  SRV_LISTENERS = 32 /* and one more, since localhost is two */
};

struct ex {
  /* -- fixed, but for pub.size, which server->lock guards */
  struct nbdserve_export pub; /* as the host described it, defaults filled in */
  struct nbdserve *server;
  int from_callback;    /* (E1) */
  struct ex *next;      /* of those that were added */
  const char *contexts; /* names of the host's, in strings; "": no more */
  /* -- locks */
  struct os_monitor serial; /* one call at a time, with SERIAL */
  struct os_monitor lock;   /* guards the rest; woken when a flush has ended */
  uint64_t flushes_begun;   /* their number so far: the last one's number */
  uint64_t flush_failed;    /* number of the last one that failed; 0: none */
  int flush_err;            /* the error of that one */
  int flush_runs;           /* the last one has not returned */
  /* -- fixed */
  char strings[]; /* name, description, the metadata contexts: each with its
                     NUL, and one behind them */
};

struct srv_listener {
  int fd;
  int is_unix;    /* text is the path of a socket that is ours to remove... */
  struct stat st; /* ...if it still is this one */
  char text[128]; /* that path, HOST:PORT, or "" */
};

/* A server.  struct conn is in [8]. */
struct nbdserve {
  /* -- fixed after nbdserve_new (the command sets find, list and lifeline) */
  struct nbdserve_config config; /* defaults filled in */
  long cpus;    /* processors of the system, or -1: see tx_answers_early */
  int lifeline; /* of all clients of nbdserve_serve: see struct io */
  int stop[2];  /* pipe: nbdserve_stop was called, and when: see struct io */
  int wake[2];  /* two pipes, one in each direction: [0] is readable when
                   nbdserve_wake was called, [1] when a client has left */
  /* -- the thread that calls nbdserve_run */
  struct srv_listener listeners[SRV_LISTENERS + 1];
  int nlisteners;
  int64_t tell_after; /* in os_now_ms: when to say again that clients wait */
  int turn;           /* the listener to look at first */
  int finished;       /* srv_finish has done its steps */
  /* -- guarded by lock, in which nobody waits */
  struct os_monitor lock;
  struct ex *exports; /* (E1): the list only grows, at its end */
  struct conn *conns; /* clients that are being served */
  unsigned nlies;     /* wrong results of the host's functions so far */
  int64_t idle_since; /* when the last client left; 0: never run */
  uint32_t rounds;    /* of all clients: see tx_answers_early */
  struct nbdserve_stats totals;
};

/* ---- The layer around the host's functions ------------------------------- */

/* Says that a function of the host's has given what it must not, which is taken
 * as the -EIO that is returned.  where: the name of the export, or "" for a
 * function of the config. */
static int ex_lied(struct nbdserve *s, const char *where, const char *function,
                   const char *what) {
  os_lock(&s->lock);
  unsigned n = ++s->nlies;
  os_unlock(&s->lock);
  if (n <= EX_LOGGED)
    u_log(&s->config, NBDSERVE_LOG_ERROR,
          "export '%s': the host's %s %s; taken as EIO%s", where, function,
          what, n == EX_LOGGED ? "; no more of these are logged" : "");
  return -EIO;
}

/* What a function of the host's has returned, if that is 0 or a -errno value.
 * Any other number is no reason to end the host's process, nor to tell a client
 * something wrong: it becomes -EIO. */
static int ex_believe(struct nbdserve *s, const char *where,
                      const char *function, int r) {
  if (r <= 0 && r >= -4095) return r; /* no system has a larger errno */
  return ex_lied(s, where, function, "returned no -errno value");
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

/* Can a host give its metadata contexts these names (nbdserve.h)?  *size: bytes
 * that they take, each with its NUL, and one behind them. */
static int ex_are_contexts(const char *const *names, size_t *size) {
  *size = 1;
  for (size_t i = 0; names && names[i]; i++) {
    const char *p = names[i];
    size_t n = strlen(p);
    if (*p == ':' || !strchr(p, ':') || !strncmp(p, "base:", 5)) return 0;
    while (*p && u_utf8_len(p))
      p += u_utf8_len(p);
    if (*p || n > WIRE_STRING_MAX || p[-1] == ':') return 0;
    for (size_t k = 0; k < i; k++)
      if (strcmp(names[k], names[i]) == 0) return 0;
    *size += n + 1;
  }
  return 1;
}

/* Fills in what the host has left at 0.  Is the export possible then?  The
 * limits are those of nbdserve.h, and most of them come from proto.md, Size
 * constraints and Values.  An export without write is read-only, whatever its
 * flags say.  *contexts_size: see ex_are_contexts. */
static int ex_complete(struct nbdserve_export *e, size_t *contexts_size) {
  if (!e->name) e->name = "";
  if (!e->description) e->description = "";
  if (!e->min_block) e->min_block = 1;
  if (!e->preferred_block)
    e->preferred_block =
        e->min_block > EX_DEFAULT_BLOCK ? e->min_block : EX_DEFAULT_BLOCK;
  if (!e->max_request)
    e->max_request = (uint32_t)u_min(EX_DEFAULT_MAX, NBDSERVE_MAX_REQUEST);
  if (!e->ops || !e->ops->read) return 0;
  if (!ex_are_contexts(e->contexts, contexts_size)) return 0;
  int is_flat = e->ops->run_batch && !e->ops->next_context;
  if (e->contexts && (!e->ops->extents || is_flat)) return 0;
  if (!e->ops->write) e->flags |= NBDSERVE_EXPORT_READONLY;
  if (e->size > INT64_MAX || e->flags & ~(uint32_t)EX_ALL_FLAGS) return 0;
  if (strlen(e->name) > WIRE_STRING_MAX) return 0;
  if (strlen(e->description) > WIRE_STRING_MAX) return 0;
  if (!u_is_power_of_2(e->min_block) || e->min_block > 65536) return 0;
  if (!u_is_power_of_2(e->preferred_block)) return 0;
  if (e->preferred_block < 512 || e->preferred_block < e->min_block) return 0;
  return e->max_request >= e->preferred_block &&
         e->max_request <= NBDSERVE_MAX_REQUEST;
}

/* Makes an export of what the host describes.  On success it owns from->ctx.
 * -EINVAL: not a possible description, -ENOMEM: ctx stays the caller's.
 *
 * The host may free its strings afterwards: they are copied to the end of
 * struct ex, and pub points there. */
static int ex_new(struct nbdserve *s, const struct nbdserve_export *from,
                  struct ex **out) {
  struct nbdserve_export e = *from;
  size_t size;
  if (!ex_complete(&e, &size)) return -EINVAL;
  size += strlen(e.name) + strlen(e.description) + 2;
  struct ex *ex = u_zalloc(sizeof *ex + size);
  if (!ex) return -ENOMEM;
  os_monitor_init(&ex->serial);
  os_monitor_init(&ex->lock);
  assert(e.max_request > 0 && e.min_block <= e.preferred_block);
  ex->server = s;
  ex->pub = e;
  ex->pub.name = ex->strings;
  char *end = stpcpy(ex->strings, e.name) + 1;
  ex->pub.description = end;
  end = stpcpy(end, e.description) + 1;
  ex->pub.contexts = NULL;
  ex->contexts = end;
  for (size_t i = 0; e.contexts && e.contexts[i]; i++)
    end = stpcpy(end, e.contexts[i]) + 1;
  assert(end < ex->strings + size && !*end && !ex->next);
  assert(ex->pub.ops->read && ex->pub.size <= INT64_MAX);
  *out = ex;
  return 0;
}

/* Where the added export of that name stands in the list; if there is none, its
 * end.  The caller holds s->lock. */
static struct ex **ex_by_name(struct nbdserve *s, const char *name) {
  struct ex **place = &s->exports;
  while (*place && strcmp((*place)->pub.name, name) != 0)
    place = &(*place)->next;
  return place;
}

/* The added export behind that one, or behind NULL the first one; NULL: there
 * is no more.  (E1): they stay, so no lock is needed in between. */
static struct ex *ex_next(struct nbdserve *s, const struct ex *ex) {
  os_lock(&s->lock);
  struct ex *next = ex ? ex->next : s->exports;
  os_unlock(&s->lock);
  return next;
}

/* Gives back what ex_acquire gave; frees it if it was the client's (E1). */
static void ex_release(struct ex *ex) {
  assert(ex);
  if (ex->from_callback) ex_free(ex);
}

/* Finds the export that a client means.  -ENOENT: there is none; others: what
 * the host's find callback said, or -EIO if what it gave is not a valid export.
 * ex_release gives the export back.
 *
 * First comes an added export of that very name, then what the host's callback
 * knows, which the client owns, last an added one that serves names which no
 * other has. */
static int ex_acquire(struct nbdserve *s, const char *name, struct ex **out) {
  const struct nbdserve_config *k = &s->config;
  struct nbdserve_export e = {0};
  os_lock(&s->lock);
  struct ex *ex = *ex_by_name(s, name);
  /* For a name that no other has: the first one for the empty name, else one
   * that takes any name. */
  struct ex *fallback = s->exports;
  while (fallback && *name && !(fallback->pub.flags & NBDSERVE_EXPORT_FALLBACK))
    fallback = fallback->next;
  os_unlock(&s->lock);
  int err = -ENOENT;
  if (!ex && k->find)
    err = ex_believe(s, name, "find", k->find(k->ctx, name, &e));
  *out = ex ? ex : fallback;
  if (err) return err == -ENOENT && *out ? 0 : err;
  if (!e.name) e.name = name;
  err = ex_new(s, &e, out);
  if (err == -EINVAL) err = ex_lied(s, name, "find", "gave a wrong export");
  if (err && e.ops && e.ops->close) e.ops->close(e.ctx);
  if (!err) (*out)->from_callback = 1; /* (E1) */
  return err;
}

/* Puts the name of the metadata context that comes after `number` into
 * name[WIRE_STRING_MAX + 1], and returns its number; 0: there is no more.  A
 * backend of ours knows its contexts; if the host names some, only those
 * count. */
static uint32_t ex_next_context(const struct ex *ex, uint32_t number,
                                char *name) {
  const struct nbdserve_ops *ops = ex->pub.ops;
  const char *own = ex->contexts; /* the first one has the number 1 */
  if (!ops->next_context) {
    for (uint32_t i = 0; i < number && *own; i++)
      own += strlen(own) + 1;
    strcpy(name, own);
    return *name ? number + 1 : 0;
  }
  while ((number = ops->next_context(ex->pub.ctx, number, name)) != 0) {
    for (own = ex->contexts; *own && strcmp(own, name) != 0;)
      own += strlen(own) + 1;
    if (!*ex->contexts || *own) return number;
  }
  return 0;
}

/* Finds out what a client gets to know of an export now.  Each transmission
 * flag is set exactly when the thing works on this export.  One that find gave
 * keeps the size that it came with; of others the size is asked for anew each
 * time, under s->lock: see ops->size in nbdserve.h.  has_contexts: the client
 * has selected some.  0, or -EIO if the host's function gives no size. */
static int ex_ask_info(struct ex *ex, enum wire_mode mode, int has_contexts,
                       struct nbdserve_info *info) {
  const struct nbdserve_config *k = &ex->server->config;
  struct nbdserve_export *e = &ex->pub;
  int writable = !(e->flags & NBDSERVE_EXPORT_READONLY);
  os_lock(&ex->server->lock);
  uint64_t now = e->size;
  if (e->ops->size && !ex->from_callback) now = e->ops->size(e->ctx, now);
  if (now <= INT64_MAX) e->size = now;
  os_unlock(&ex->server->lock);
  if (now > INT64_MAX)
    return ex_lied(ex->server, e->name, "size", "returned more than INT64_MAX");
  info->size = now - now % e->min_block; /* no request reaches the rest */
  info->min_block = e->min_block;
  info->preferred_block = e->preferred_block;
  info->max_request = e->max_request;
  uint32_t f = 0;
  if (e->flags & NBDSERVE_EXPORT_ROTATIONAL) f |= NBD_FLAG_ROTATIONAL;
  /* With a single slot a second connection would wait until the first ends. */
  if (e->flags & NBDSERVE_EXPORT_MULTI_CONN && k->max_conn > 1)
    f |= NBD_FLAG_CAN_MULTI_CONN;
  if (e->ops->cache) f |= NBD_FLAG_SEND_CACHE;
  if (mode != MODE_SIMPLE) f |= NBD_FLAG_SEND_DF;
  if (mode == MODE_EXTENDED && has_contexts) f |= NBD_FLAG_BLOCK_STATUS_PAYLOAD;
  if (writable) f |= NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
  if (writable && e->ops->flush) f |= NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA;
  if (writable && e->ops->trim) f |= NBD_FLAG_SEND_TRIM;
  f &= ~k->without;
  info->flags = f | NBD_FLAG_HAS_FLAGS | (writable ? 0 : NBD_FLAG_READ_ONLY);
  return 0;
}

/* See nbdserve.h. */
int nbdserve_info(struct nbdserve *s, const char *name,
                  struct nbdserve_info *out) {
  struct ex *ex;
  int err = ex_acquire(s, name ? name : "", &ex);
  if (err) return err;
  err = ex_ask_info(ex, MODE_SIMPLE, 0, out);
  ex_release(ex);
  return err;
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
  default:
    assert(r->type == NBD_CMD_BLOCK_STATUS); /* (E2) */
    return ops->extents ? ops->extents(ctx, r->off, r->len, f, x) : 0;
  }
}

/* The same, for an export that is SERIAL one call at a time.  0 or -errno: the
 * result is that of a host's function, so it is not believed (E4). */
static int ex_call(struct ex *ex, const struct nbdserve_req *r,
                   struct nbdserve_extents *x) {
  int is_serial = (ex->pub.flags & NBDSERVE_EXPORT_SERIAL) != 0;
  if (is_serial) os_lock(&ex->serial);
  int err = ex_dispatch(ex, r, x);
  if (is_serial) os_unlock(&ex->serial);
  return ex_believe(ex->server, ex->pub.name, wire_cmd(r->type)->name, err);
}

/* ---- Flush --------------------------------------------------------------- */

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
  const struct nbdserve_req r = {.type = NBD_CMD_FLUSH};
  struct nbdserve *s = ex->server;
  if (!ex->pub.ops->flush || (ex->pub.flags & NBDSERVE_EXPORT_UNSAFE)) return 0;
  os_lock(&ex->lock);
  uint64_t needed = ex->flushes_begun + 1; /* the first that begins after now */
  while (ex->flush_runs && ex->flushes_begun <= needed)
    os_wait(&ex->lock);
  if (ex->flushes_begun < needed) {
    ex->flushes_begun = needed;
    ex->flush_runs = 1;
    os_unlock(&ex->lock);
    int failed = ex_call(ex, &r, NULL);
    os_lock(&s->lock);
    s->totals.flushes++;
    os_unlock(&s->lock);
    os_lock(&ex->lock);
    ex->flush_runs = 0;
    if (failed) {
      ex->flush_failed = needed;
      ex->flush_err = failed;
    }
    os_wake_all(&ex->lock);
  }
  assert(ex->flushes_begun >= needed);
  assert(ex->flush_failed <= ex->flushes_begun);
  int err = ex->flush_failed >= needed ? ex->flush_err : 0;
  os_unlock(&ex->lock);
  return err;
}

/* ---- Block status -------------------------------------------------------- */

/* The reply to a BLOCK_STATUS, while it is made: a chunk for each context that
 * is asked for, with its head, one behind the other. */
struct nbdserve_extents {
  uint32_t context;  /* the number of that which is being described */
  uint64_t left;     /* bytes of the request that are still to be described */
  uint64_t overhang; /* bytes at the front of the next extent from the host
                        that were described with the one before it */
  uint64_t align;    /* boundaries in the reply are multiples of it */
  unsigned n;        /* extents so far */
  unsigned max;      /* that the chunk may have */
  int lied;          /* the host gave a status that does not exist */
  size_t each;       /* bytes of an extent: 16 if it is extended, else 8 */
  uint64_t last_len; /* of the last extent so far */
  uint32_t last_status;
  unsigned char *data; /* where the extents of this chunk begin in the reply */
};

/* See nbdserve.h. */
unsigned nbdserve_extents_context(const struct nbdserve_extents *x) {
  return x->context;
}

/* Adds len bytes to the extents of the chunk: to the last one, if the status is
 * the same.  If there is no room the report ends here.  The last extent is
 * written anew each time it grows, so that the chunk is always complete. */
static void ex_put_extent(struct nbdserve_extents *x, uint64_t len,
                          uint32_t status) {
  assert(len > 0 && len <= x->left && x->n <= x->max);
  int is_new = !x->n || x->last_status != status;
  int fits = !is_new || x->n < x->max;
  x->left = fits ? x->left - len : 0;
  if (!fits) return;
  x->last_len = is_new ? len : x->last_len + len;
  x->last_status = status;
  if (is_new) x->n++;
  unsigned char *p = x->data + x->each * (x->n - 1);
  if (x->each == WIRE_EXT_EXTENT_LEN) {
    u_put64(p, x->last_len);
    u_put64(p + 8, x->last_status);
  } else {
    assert(x->last_len <= UINT32_MAX); /* as was the request's */
    u_put32(p, (uint32_t)x->last_len);
    u_put32(p + 4, x->last_status);
  }
}

/* Cuts what the host reports at multiples of align: [a block that it shares
 * with the extent before][whole blocks][a block that it shares with the next
 * one].  A shared block is described as data, or in other contexts as 1, which
 * is dirty, whatever its parts are. */
int nbdserve_extent(struct nbdserve_extents *x, uint64_t len, uint32_t status) {
  uint32_t known = NBDSERVE_EXTENT_HOLE | NBDSERVE_EXTENT_ZERO;
  if (!x->context && status & ~known) x->lied = 1;
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
    ex_put_extent(x, block, x->context ? 1 : 0);
  }
  return x->left == 0;
}

/* Asks for the extents of a request, in each context that it asks for.  r->buf
 * becomes its reply, of r->data_len bytes, which the request owns.  What a host
 * does not describe is data, but no other context may be left out: clean would
 * be wrong. */
static int ex_block_status(struct ex *ex, struct nbdserve_req *r) {
  int extended = r->mode == MODE_EXTENDED;
  unsigned type =
      extended ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT : NBD_REPLY_TYPE_BLOCK_STATUS;
  struct nbdserve_extents x = {.align = ex->pub.min_block, .each = 8};
  unsigned nasked = 1;
  assert(r->mode != MODE_SIMPLE && !r->owned && r->asked);
  if (extended) x.each = WIRE_EXT_EXTENT_LEN;
  for (uint32_t more = r->asked & (r->asked - 1); more; more &= more - 1)
    nasked++;
  uint64_t most = ex->pub.max_request / WIRE_EXT_EXTENT_LEN;
  most = u_min(u_min(most, EX_EXTENTS / nasked), r->len / x.align + 1);
  x.max = r->flags & NBD_CMD_FLAG_REQ_ONE ? 1 : (unsigned)most;
  size_t fixed = extended ? 8 : 4; /* what stands before the extents */
  size_t head = wire_chunk_len(r->mode) + fixed;
  r->buf = r->owned = NBDSERVE_MALLOC(nasked * (head + x.each * x.max));
  if (!r->buf) return -ENOMEM;
  unsigned char *chunk = r->buf;
  for (unsigned i = 0; r->asked >> i; i++) {
    if (!(r->asked >> i & 1)) continue;
    x.data = chunk + head;
    x.context = r->contexts->number[i];
    x.left = r->len;
    x.overhang = x.n = 0;
    int err = ex_call(ex, r, &x);
    const char *lie = x.lied ? "gave a status that does not exist" : NULL;
    if (!x.n && x.context) lie = "gave no extent";
    if (!err && lie) err = ex_lied(ex->server, ex->pub.name, "extents", lie);
    if (err) return err;
    if (!x.n) nbdserve_extent(&x, r->len, 0); /* proto.md: at least one */
    assert(x.n > 0 && x.n <= x.max);
    r->more_chunks = r->asked >> i > 1;
    wire_put_chunk(chunk, r, type, fixed + x.each * x.n);
    u_put32(x.data - fixed, wire_context_id(x.context));
    if (extended) u_put32(x.data - 4, x.n);
    chunk = x.data + x.each * x.n;
  }
  r->data_len = (size_t)(chunk - r->buf);
  return 0;
}

/* ---- One request on a backend -------------------------------------------- */

/* Does a request, without the flush that may have to follow.  0 or -errno.
 *
 * A WRITE_ZEROES that the backend does not have is done by writing zeroes.  A
 * range above 4 GiB is -EOVERFLOW then: it would take long, and nobody could
 * cancel it.  The zeroes have the length of one write, at most 1 MiB, and are
 * written again and again.  With FUA each of these writes has it. */
static int ex_execute(struct ex *ex, struct nbdserve_req *r) {
  assert(r->len > 0 && r->off <= INT64_MAX && r->len <= INT64_MAX - r->off);
  assert(r->off % ex->pub.min_block == 0); /* (E2) */
  assert(!wire_cmd(r->type)->writes ||
         !(ex->pub.flags & NBDSERVE_EXPORT_READONLY));
  assert(r->buf || !req_moves_data(r));
  if (r->type == NBD_CMD_BLOCK_STATUS) return ex_block_status(ex, r);
  int err = ex_call(ex, r, NULL);
  if (err != -ENOTSUP || r->type != NBD_CMD_WRITE_ZEROES) return err;
  if (r->flags & NBD_CMD_FLAG_FAST_ZERO) return err;
  if (r->len > UINT32_MAX) return -EOVERFLOW;
  uint64_t step = u_min(u_min(r->len, 1 << 20), ex->pub.max_request);
  step -= step % ex->pub.min_block; /* r->len is a multiple, so is the rest */
  assert(step > 0);
  struct nbdserve_req w = {.type = NBD_CMD_WRITE, .off = r->off};
  w.flags = r->flags & NBD_CMD_FLAG_FUA;
  w.buf = u_zalloc((size_t)step);
  err = w.buf ? 0 : -ENOMEM;
  for (uint64_t left = r->len; left > 0 && !err; left -= w.len) {
    w.len = u_min(step, left);
    err = ex_call(ex, &w, NULL);
    w.off += w.len;
  }
  NBDSERVE_FREE(w.buf);
  return err;
}

/* ---- nbdserve's own backends ----------------------------------------------
 * They do READs and WRITEs many at a time, in ops->run_batch:
 *
 *   void run_batch(void *ctx, struct nbdserve_req *r, size_t n)
 *
 * does r[0..n), which may be mixed, in any order and with as few system calls
 * as it can, in the calling thread, and sets err of each.  A READ that would
 * have to wait for the medium gets -EAGAIN, where that can be told, unless it
 * may wait.  Requests that overlap are the client's own risk.  It may run in
 * several threads at once.
 *
 * The context of such a backend begins with struct ex_batched, so that read and
 * write, which the command and tests call, can be batches of one. */
struct ex_batched {
  void (*run_batch)(void *ctx, struct nbdserve_req *r, size_t n);
};

/* ops->read of a backend that has run_batch. */
static inline int ex_batched_read(void *ctx, void *buf, uint64_t off,
                                  uint64_t len, uint32_t flags) {
  struct nbdserve_req r = {
      .type = NBD_CMD_READ, .off = off, .len = len, .buf = buf, .may_wait = 1};
  (void)flags;
  ((struct ex_batched *)ctx)->run_batch(ctx, &r, 1);
  return r.err;
}

/* ops->write of a backend that has run_batch. */
static inline int ex_batched_write(void *ctx, const void *buf, uint64_t off,
                                   uint64_t len, uint32_t flags) {
  struct nbdserve_req r = {.type = NBD_CMD_WRITE, .off = off, .len = len};
  assert(!(flags & NBDSERVE_CMD_FUA)); /* not NATIVE_FUA: a flush follows */
  (void)flags;
  r.buf = (unsigned char *)(uintptr_t)buf; /* which a WRITE only reads */
  ((struct ex_batched *)ctx)->run_batch(ctx, &r, 1);
  return r.err;
}

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
 *                  of the batch's       the batch; a piece  workers
 *                  WRITEs               of a long request
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
 *   the batch, pipe
 *   sending             whoever answers a request        send_lock
 *   queue               the client's thread, workers     queue_lock
 *
 * The phase is not stored: it follows from where the client's thread is.
 * queue_lock is waited on by idle workers, for work, and by the client's
 * thread, for a worker to finish (reader_waits). */

enum {
  CONN_RBUF = 256 << 10,       /* bytes received at a time */
  HS_WITHOUT_OPTIONS = 16,     /* from this bit of config.without on: options */
  TX_IN_BATCH_MAX = 128 << 10, /* the longest READ or WRITE in a batch */
  TX_SPLICE_MIN = 32 << 10,    /* the shortest READ that is spliced */
  TX_SLOTS = 288 << 10, /* bytes of a batch's slots: 64 READs of 4 KiB fit */
  TX_PIECE = 1 << 20,   /* longer ones are done in pieces of this size, which is
                         also the longest that a worker gets, the longest
                         single chunk, and IO_UNIT */
  TX_BATCH = 128,       /* requests in a batch, at most */
  TX_HEADS = 32,        /* long heads that leave in one send, at most */
  TX_FLUSHES = 64,      /* see tx_flush */
  TX_HANDED_OVER = 1024, /* requests with workers, at most */
  TX_QUICK_NS = 50000,   /* a flush that takes less is not handed over */
  TX_SPARES = 16,        /* buffers that a client keeps */
  TX_IDLE_MS = 5000,     /* a worker without work ends after that */
  TX_ERROR_TEXT = 80,    /* bytes of an error's text that are sent */
  TX_HEAD_ROOM = 64, /* bytes before a READ's data, for its head: 40 and more */
  TX_HEAD_MAX =      /* the longest reply without data: ERROR_OFFSET */
      WIRE_EXT_CHUNK_LEN + WIRE_ERROR_LEN + TX_ERROR_TEXT + WIRE_OFFSET_LEN,
  CONN_WBUF = TX_HEAD_ROOM + TX_PIECE
};
STATIC_ASSERT(option_fits, (int)NBDSERVE_MAX_OPTION <= (int)CONN_RBUF);
STATIC_ASSERT(option_holds_a_name, NBDSERVE_MAX_OPTION >= WIRE_STRING_MAX);
STATIC_ASSERT(write_fits,
              TX_IN_BATCH_MAX + (int)WIRE_EXT_REQUEST_LEN <= (int)CONN_RBUF);
STATIC_ASSERT(read_fits, TX_IN_BATCH_MAX + TX_HEAD_ROOM <= TX_SLOTS);
STATIC_ASSERT(slots_fit, TX_SLOTS <= (int)CONN_WBUF);
STATIC_ASSERT(head_fits,
              WIRE_EXT_CHUNK_LEN + (int)WIRE_OFFSET_LEN <= (int)TX_HEAD_ROOM);
STATIC_ASSERT(piece_is_unit, (int)TX_PIECE == (int)IO_UNIT);
STATIC_ASSERT(selected_contexts_fit,
              WIRE_CONTEXTS *(WIRE_OPTION_REPLY_LEN + 4 + WIRE_STRING_MAX) <=
                  (int)CONN_WBUF); /* see hs_opt_meta_context */

struct conn {
  /* -- fixed */
  struct nbdserve *s;
  int id;     /* for messages: clients are numbered from 1 on */
  int fd;     /* a socket that is closed in the end; -1: it is the caller's */
  int is_tcp; /* see srv_serve_client, tx_splice */
  char peer[64];
  /* -- */
  struct conn *next; /* of s->conns */
  struct io io;      /* says itself who may touch what */
  /* -- negotiated */
  enum wire_mode mode;
  int no_zeroes;             /* NBD_FLAG_NO_ZEROES: no padding, please */
  struct ex *export;         /* NULL: none so far */
  struct nbdserve_info info; /* what the client was told of it */
  struct ex *chosen; /* what the last SET_META_CONTEXT has found, or NULL, */
  struct wire_contexts contexts; /* and what is selected there, */
  int has_contexts; /* some are, and `export` was entered by that name */
  void (*run_batch)(void *ctx, struct nbdserve_req *r, size_t n); /* or NULL */
  /* -- the option that is being answered */
  uint32_t option;
  const unsigned char *option_data; /* what is left of its data */
  size_t option_left;               /* bytes there */
  /* -- receiving */
  size_t rbuf_pos; /* rbuf[rbuf_pos..rbuf_end) is received and not looked at */
  size_t rbuf_end;
  size_t needed;    /* bytes that are to be there of the next request */
  int is_past_half; /* of what recv() brought: see tx_answers_early */
  uint32_t rounds;  /* nbdserve.rounds as of this client's last one */
  uint64_t busy;    /* 8 times the other clients that are busy, on average */
  int after_long_write; /* another one is likely: see tx_receive */
  /* -- the batch */
  size_t nbatch;    /* requests in batch[] */
  size_t wbuf_used; /* bytes of slots, or of replies to options, in wbuf */
  unsigned flushes_to_workers; /* so many of the next: see tx_flush */
  /* -- sending */
  struct os_monitor send_lock; /* held while io.out is written to */
  int send_err;                /* why nothing is sent any more */
  /* -- data on its way from the file to the socket: see tx_splice */
  int pipe[2];      /* [0] -1: there is none, as yet or for good */
  size_t pipe_room; /* bytes that fit; 0: not tried yet; 1: given up */
  /* -- queue */
  struct os_monitor queue_lock;
  struct nbdserve_req *queue; /* lists, each for one worker */
  struct nbdserve_req **queue_end;
  struct nbdserve_req *to_flush; /* one worker takes all of them */
  int flush_at_work;             /* a worker took others and is not done */
  int is_flush_quick;            /* the last flush was: see tx_flush */
  unsigned nqueue;
  unsigned nhanded_over; /* in both lists, and being done */
  unsigned nworkers;
  unsigned nidle;
  int closing;            /* DRAINING: no more work comes, workers end */
  int reader_waits;       /* the client's thread waits for a worker */
  unsigned nbuffers;      /* that requests own */
  void *spare[TX_SPARES]; /* [nspares]: see tx_take_buffer */
  size_t nspares;
  unsigned nlogged; /* failed requests that were logged */
  /* -- last, and not zeroed, so that an idle client does not need the memory */
  struct nbdserve_req batch[TX_BATCH];
  char chosen_name[WIRE_STRING_MAX + 1]; /* of `chosen` */
  unsigned char rbuf[CONN_RBUF];
  unsigned char wbuf[CONN_WBUF];
};

/* Tells the host's log about a client; the text begins with its number. */
#define conn_log(c, level, fmt, ...) \
  u_log(&(c)->s->config, level, "client %d: " fmt, (c)->id, __VA_ARGS__)

/* Sends the n pieces at v, and behind them `spliced` bytes that the pipe has,
 * in one go as far as other threads can see.  After the first error nothing is
 * sent any more, and the client's thread, which may wait for a request, is told
 * by the end of its stream (unless that is a pipe of its own).  Returns 0, or
 * -errno, which may be of an earlier send: with nothing to send only that is
 * looked at. */
static int conn_send(struct conn *c, struct iovec *v, int n, size_t spliced) {
  os_lock(&c->send_lock);
  if (!c->send_err && (n || spliced)) {
    /* The pipe is the client's thread's, and only that splices. */
    c->send_err = io_send(&c->io, v, n, spliced ? *c->pipe : -1, spliced);
    if (c->send_err) shutdown(c->io.out, SHUT_RDWR);
  }
  int err = c->send_err;
  os_unlock(&c->send_lock);
  return err;
}

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
  return conn_send(c, &v, 1, 0);
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

/* Begins a reply to the current option.  Its data are n bytes at the result,
 * which the caller writes, and behind them the text. */
static unsigned char *hs_reply(struct conn *c, uint32_t type, size_t n,
                               const char *text) {
  size_t len = n + strlen(text);
  unsigned char *p = hs_reserve(c, WIRE_OPTION_REPLY_LEN + len);
  assert(len <= UINT32_MAX);
  u_put64(p, NBD_REP_MAGIC);
  u_put32(p + 8, c->option);
  u_put32(p + 12, type);
  u_put32(p + 16, (uint32_t)len);
  memcpy(p + WIRE_OPTION_REPLY_LEN + n, text, len - n);
  return p + WIRE_OPTION_REPLY_LEN;
}

/* Answers the option with success. */
static int hs_ack(struct conn *c) {
  hs_reply(c, NBD_REP_ACK, 0, "");
  return 0;
}

/* Answers the option with an error; haggling goes on. */
static int hs_refuse(struct conn *c, uint32_t type, const char *why) {
  hs_reply(c, type, 0, why);
  conn_log(c, NBDSERVE_LOG_INFO, "option %" PRIu32 " refused: %s", c->option,
           why);
  return 0;
}

/* ---- Reading an option's data -------------------------------------------- */

/* Takes n bytes off the option's data.  NULL: there are not so many. */
static const unsigned char *hs_take(struct conn *c, size_t n) {
  const unsigned char *p = c->option_data;
  if (n > c->option_left) return NULL;
  c->option_data += n;
  c->option_left -= n;
  return p;
}

/* Takes a string with its 32-bit length off the option's data and copies it to
 * out[WIRE_STRING_MAX + 1].  0, or the error to answer with. */
static uint32_t hs_take_string(struct conn *c, char *out) {
  const unsigned char *p = hs_take(c, 4);
  size_t n = p ? u_get32(p) : 0;
  if (p) p = hs_take(c, n);
  if (!p) return NBD_REP_ERR_INVALID;
  if (n > WIRE_STRING_MAX) return NBD_REP_ERR_TOO_BIG;
  memcpy(out, p, n);
  out[n] = 0;
  return memchr(out, 0, n) ? NBD_REP_ERR_INVALID : 0; /* NAME NUL JUNK */
}

/* ---- Entering an export -------------------------------------------------- */

/* Finds the export of that name, which the connection owns from now on, and
 * settles all that transmission has to know of it.  It is the one for which
 * contexts are selected if it has the same name, even if another one has that
 * name by now: contexts and data belong together.  0, or -errno as ex_acquire.
 */
static int hs_enter(struct conn *c, const char *name) {
  int is_chosen = c->chosen && strcmp(c->chosen_name, name) == 0;
  struct ex *ex = c->chosen;
  assert(!c->export);
  int err = is_chosen ? 0 : ex_acquire(c->s, name, &ex);
  if (err) return err;
  c->has_contexts = is_chosen && c->contexts.n > 0;
  err = ex_ask_info(ex, c->mode, c->has_contexts, &c->info);
  assert(!err || !ex->from_callback); /* nothing to release */
  if (err) return err;
  c->export = ex;
  /* `before` is asked for each request, so there is nothing to do together. */
  c->run_batch = c->s->config.before ? NULL : ex->pub.ops->run_batch;
  return 0;
}

/* Gives the export back, unless it is `chosen`. */
static void hs_leave(struct conn *c) {
  if (c->export && c->export != c->chosen) ex_release(c->export);
  c->export = NULL;
}

/* Lets go of the contexts that are selected, and of the export that has them,
 * unless that is entered. */
static void hs_drop_contexts(struct conn *c) {
  if (!c->chosen) return;
  const struct nbdserve_export *e = &c->chosen->pub;
  while (c->contexts.n > 0) {
    uint32_t number = c->contexts.number[--c->contexts.n];
    if (number && e->ops->use_context) e->ops->use_context(e->ctx, number, 0);
  }
  if (c->chosen != c->export) ex_release(c->chosen);
  c->chosen = NULL;
}

/* ---- The options -----------------------------------------------------------
 * Each function takes its option's data, which is all there, and answers: 0, or
 * the -errno that closes the connection.  When c->export is set haggling ends.
 */

/* proto.md, NBD_OPT_EXPORT_NAME: all of the data is the name.  This option has
 * no error reply: what is wrong closes the connection. */
static int hs_opt_export_name(struct conn *c) {
  size_t len = c->no_zeroes ? 10 : 10 + 124; /* zeroes behind it */
  char name[WIRE_STRING_MAX + 1];
  if (c->mode == MODE_EXTENDED) return -EPROTO; /* GO is needed */
  assert(c->option_left <= WIRE_STRING_MAX);    /* hs_option has seen to it */
  memcpy(name, c->option_data, c->option_left);
  name[c->option_left] = 0;
  if (strlen(name) != c->option_left) return -ENOENT;
  int err = hs_enter(c, name);
  if (err) return err;
  unsigned char *p = memset(hs_reserve(c, len), 0, len);
  u_put64(p, c->info.size);
  u_put16(p + 8, c->info.flags);
  return 0;
}

/* Lists an export; the host's list callback calls it, too.  Not 0: the client
 * is gone, and the rest is for nobody. */
static int hs_list_one(void *conn, const char *name, const char *description) {
  struct conn *c = conn;
  if (!name) name = "";
  if (!description) description = "";
  size_t n = strlen(name);
  /* The protocol has no longer strings, so it cannot be listed. */
  if (n > WIRE_STRING_MAX || strlen(description) > WIRE_STRING_MAX) return 0;
  unsigned char *p = hs_reply(c, NBD_REP_SERVER, 4 + n, description);
  u_put32(p, (uint32_t)n);
  memcpy(p + 4, name, n);
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
        strerror(-err));
  return hs_refuse(c, NBD_REP_ERR_UNKNOWN, "the list is not complete");
}

/* proto.md, NBD_OPT_INFO and NBD_OPT_GO: the same, but GO enters the export.
 * NBD_INFO_EXPORT is always sent; block sizes also unasked if they are not what
 * a client takes for granted. */
static int hs_opt_go(struct conn *c) {
  char name[WIRE_STRING_MAX + 1];
  unsigned asked = 0; /* a bit for each NBD_INFO_...; others are ignored */
  uint32_t bad = hs_take_string(c, name);
  const unsigned char *p = hs_take(c, 2); /* the number of types behind it */
  if (!bad && (!p || c->option_left != 2u * u_get16(p)))
    bad = NBD_REP_ERR_INVALID;
  if (bad) return hs_refuse(c, bad, "malformed request for information");
  while ((p = hs_take(c, 2)) != NULL)
    if (u_get16(p) <= NBD_INFO_BLOCK_SIZE) asked |= 1u << u_get16(p);
  int err = hs_enter(c, name);
  const char *why = err == -ENOENT ? "no such export" : strerror(-err);
  if (err) return hs_refuse(c, NBD_REP_ERR_UNKNOWN, why);
  const struct nbdserve_export *e = &c->export->pub;
  unsigned char *info = hs_reply(c, NBD_REP_INFO, 12, "");
  u_put16(info, NBD_INFO_EXPORT);
  u_put64(info + 2, c->info.size);
  u_put16(info + 10, c->info.flags);
  if (asked & 1u << NBD_INFO_NAME)
    u_put16(hs_reply(c, NBD_REP_INFO, 2, e->name), NBD_INFO_NAME);
  if (asked & 1u << NBD_INFO_DESCRIPTION && *e->description)
    u_put16(hs_reply(c, NBD_REP_INFO, 2, e->description), NBD_INFO_DESCRIPTION);
  int asks_size = asked >> NBD_INFO_BLOCK_SIZE & 1;
  if (asks_size || e->min_block > 1 || e->max_request != EX_DEFAULT_MAX ||
      e->preferred_block != EX_DEFAULT_BLOCK) {
    info = hs_reply(c, NBD_REP_INFO, 14, "");
    u_put16(info, NBD_INFO_BLOCK_SIZE);
    u_put32(info + 2, e->min_block);
    u_put32(info + 6, e->preferred_block);
    u_put32(info + 10, e->max_request);
  }
  /* proto.md: a client that does not ask for block sizes might send unaligned
   * requests. */
  int must_ask = e->min_block > 1 && !asks_size;
  if (must_ask || c->option == NBD_OPT_INFO) hs_leave(c);
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

/* ---- Metadata contexts --------------------------------------------------- */

/* Does one of the queries mean the context of that name?  They were checked:
 * their number in 4 bytes, then each with 4 bytes of length in front.  For LIST
 * one that ends with a colon means all that begin with it, and no query at all
 * means every context. */
static int hs_is_asked(const struct conn *c, const unsigned char *queries,
                       const char *name) {
  int lists = c->option == NBD_OPT_LIST_META_CONTEXT;
  uint32_t nqueries = u_get32(queries);
  const unsigned char *p = queries + 4;
  size_t len = strlen(name);
  for (uint32_t i = 0; i < nqueries; i++) {
    size_t n = u_get32(p);
    int is_prefix = n <= len && memcmp(p + 4, name, n) == 0;
    if (is_prefix && n == len) return 1;
    if (is_prefix && lists && n && p[4 + n - 1] == ':') return 1;
    p += 4 + n;
  }
  return lists && !nqueries;
}

/* proto.md, NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.  The option
 * is answered with the contexts that the queries mean, and SET selects them.
 * Each SET takes the place of the one before: hs_option has seen to that.  The
 * backend keeps what is selected until hs_drop_contexts. */
static int hs_opt_meta_context(struct conn *c) {
  char export_name[WIRE_STRING_MAX + 1];
  char name[WIRE_STRING_MAX + 1]; /* of a query, then of a context */
  int sets = c->option == NBD_OPT_SET_META_CONTEXT;
  if (c->mode == MODE_SIMPLE)
    return hs_refuse(c, NBD_REP_ERR_INVALID, "structured replies come first");
  uint32_t bad = hs_take_string(c, export_name);
  const unsigned char *queries = hs_take(c, 4); /* from their number on */
  if (!bad && !queries) bad = NBD_REP_ERR_INVALID;
  for (uint32_t n = bad ? 0 : u_get32(queries); n > 0 && !bad; n--)
    bad = hs_take_string(c, name);
  if (!bad && c->option_left) bad = NBD_REP_ERR_INVALID;
  if (bad) return hs_refuse(c, bad, "malformed query for metadata contexts");
  if (hs_enter(c, export_name))
    return hs_refuse(c, NBD_REP_ERR_UNKNOWN, "no such export");
  if (sets) {
    strcpy(c->chosen_name, export_name);
    c->chosen = c->export;
  }
  const struct nbdserve_export *e = &c->export->pub;
  uint32_t number = 0;
  int fits = 1;
  strcpy(name, "base:allocation"); /* which every export has */
  do {
    if (c->send_err || !hs_is_asked(c, queries, name)) continue;
    fits = !sets || c->contexts.n < WIRE_CONTEXTS;
    if (!fits) break;
    int is_kept = sets && number && e->ops->use_context;
    /* One that the backend does not have any more is left out. */
    if (is_kept && e->ops->use_context(e->ctx, number, 1)) continue;
    if (sets) c->contexts.number[c->contexts.n++] = number;
    unsigned char *p = hs_reply(c, NBD_REP_META_CONTEXT, 4, name);
    u_put32(p, sets ? wire_context_id(number) : 0); /* LIST: proto.md */
  } while ((number = ex_next_context(c->export, number, name)) != 0);
  hs_leave(c);
  if (fits) return hs_ack(c);
  /* proto.md: then nothing is selected.  The replies have not left yet: those
   * to one option wait in wbuf, which so few do not fill. */
  hs_drop_contexts(c);
  c->wbuf_used = 0;
  return hs_refuse(c, NBD_REP_ERR_TOO_BIG, "too many contexts");
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

/* Receives an option and answers it.  0, CONN_LEFT or -errno. */
static int hs_option(struct conn *c) {
  unsigned char head[16];
  int err = io_recv_all(&c->io, head, sizeof head);
  if (err) return err;
  uint32_t option = c->option = u_get32(head + 8);
  uint32_t len = u_get32(head + 12);
  if (u_get64(head) != NBD_OPTION_MAGIC) return -EPROTO;
  /* This could not be answered anyway. */
  if (option == NBD_OPT_EXPORT_NAME && len > WIRE_STRING_MAX) return -ENOENT;
  /* (H1), (H2): of data that does not fit the last piece stays in rbuf, where
   * it means nothing. */
  for (uint32_t left = len, piece; left > 0; left -= piece) {
    piece = (uint32_t)u_min(left, CONN_RBUF);
    err = io_recv_all(&c->io, c->rbuf, piece);
    if (err) return err;
  }
  /* proto.md: each SET replaces the selection, also one that fails. */
  if (option == NBD_OPT_SET_META_CONTEXT) hs_drop_contexts(c);
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

/* The whole handshake: greets the client, takes its flags, and haggles until it
 * enters an export.  0: c->export is entered; else see enum conn_step. */
static int hs_run(struct conn *c) {
  uint32_t known = NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES;
  unsigned char flags[4] = {0};
  assert(!c->io.deadline && !c->export && !c->wbuf_used);
  c->io.deadline = os_now_ms() + c->s->config.handshake_ms; /* (H3) */
  unsigned char *p = hs_reserve(c, 18);
  u_put64(p, NBD_INIT_MAGIC);
  u_put64(p + 8, NBD_OPTION_MAGIC);
  u_put16(p + 16, known);
  int step = hs_send(c);
  if (!step) step = io_recv_all(&c->io, flags, sizeof flags);
  if (!step && u_get32(flags) & ~known) step = -EPROTO;
  c->no_zeroes = !step && u_get32(flags) & NBD_FLAG_NO_ZEROES;
  while (!step && !c->export) {
    step = hs_option(c);
    if (step >= 0 && hs_send(c)) step = c->send_err;
  }
  c->io.deadline = 0;
  if (!c->export || !c->has_contexts) hs_drop_contexts(c);
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
 *   refused, with a payload   nobody             wbuf, in pieces
 *   longer than a batch's
 *   READ, WRITE up to         client's thread,   WRITE: rbuf, where it came;
 *   TX_IN_BATCH_MAX           all of a batch     READ: a slot in wbuf
 *                             together
 *   READ from TX_SPLICE_MIN   client's thread    c->pipe, in pieces if it is
 *   on, as tx_splice can                         longer than a batch's
 *   other longer READ, WRITE  client's thread    wbuf, in pieces
 *   READ, WRITE up to         a worker           a buffer of its own
 *   TX_PIECE without
 *   run_batch; WRITE longer
 *   than a batch's, up to
 *   TX_PIECE, into a store
 *   FLUSH, TRIM, CACHE,       a worker; FLUSH:   BLOCK_STATUS: a buffer of its
 *   WRITE_ZEROES,             after the batch's  own
 *   BLOCK_STATUS              writes, and alone
 *                             or quick: client's
 *                             thread
 *   READs of a batch that     a worker, all one  a buffer for all of them
 *   have to wait for the      after the other
 *   medium
 *
 *   tx_run_batch     does what has gathered: when rbuf holds no whole request
 *                    any more, before one that cannot join the batch, and
 *                    mostly once halfway (tx_answers_early)
 *   tx_answer        counts, logs, sends, frees, in whichever thread is done
 *
 * Where two rows fit, the one with a worker counts; there are no workers if
 * config.threads is 1.  Without run_batch: on a host's backend, or with
 * config.before.
 *
 * A WRITE of 4 KiB to a file: recv() puts it into rbuf.  It goes into the
 * batch, and its r.buf points into rbuf, which nobody touches until the batch
 * is done.  run_batch calls pwrite from there.  The reply is one of the heads
 * that tx_answer gathers, and all replies of the batch leave in one sendmsg().
 * All of this happens in the client's thread.  A WRITE with FUA is TO_FLUSH
 * after pwrite: a worker flushes and answers, or the client's thread, if the
 * client has asked for nothing else or a flush takes no time.
 *
 * A FLUSH is TO_FLUSH from the start.  When the batch's writes are done, the
 * client's thread does it if it is alone or quick (tx_flush); otherwise it
 * joins c->to_flush, and one worker takes all requests that are there, calls
 * ex_flush once and answers them all.  ex_flush waits for a flush of the export
 * that begins after it was asked for.  A write's reply is sent only after the
 * backend's write has returned.  So, whichever client sent the write: if its
 * reply was sent before the FLUSH was received, the write had returned before
 * the flush began, and is covered by it.
 *
 * A READ of 4 KiB that is not in memory: run_batch asks the medium for it and
 * says -EAGAIN.  When all of the batch is asked for or done, the READs that
 * wait go to one worker, and the others are answered.  The worker reads them in
 * their order and answers what is there before it waits for the next one.
 * Meanwhile the client's thread takes the next requests.
 *
 * A client that never reads: who sends to it waits in poll() with send_lock
 * held, until the client takes something or its time is over (I2).  Then
 * send_err is set and nothing is sent any more.  Meanwhile the other threads of
 * this client wait when they have to send, and its own thread receives no more
 * when it has to send or too many are handed over, so memory is bounded (T5).
 * Other clients share none of these locks and do not notice.
 *
 * ---- Rules ----------------------------------------------------------------
 * (T1) Every request gets exactly one reply, DISC none.  The order is free.
 * (T2) The buffer of a READ has room for the reply's head in front of the data,
 *      so that neither is ever copied.  Those of a batch lie side by side in
 *      wbuf, each in its slot, and neighbours leave as one piece.  A READ that
 *      failed, or (but for simple replies) brought nothing but 512 zeroes or
 *      more, is answered by a head alone, which stands with the other heads.
 * (T3) A batch's writes are done before its flushes start: a flush covers all
 *      that was answered before it arrived, and more.
 * (T4) FLUSH (unless it came alone, or the one before was quick), TRIM, CACHE,
 *      WRITE_ZEROES, BLOCK_STATUS, READs in a batch that have to wait for the
 *      medium, and what has a buffer of its own, may take as long as they like:
 *      nothing behind them waits, up to the limits in (T5) and while a worker
 *      can be had; but of the READs of one batch that wait for the medium, one
 *      may have to wait for those in front of it.  What the client's thread
 *      does itself holds up the requests behind it: the rest of a batch,
 *      pieces, a READ that is spliced and has pages in its middle that are not
 *      in memory, and a flush that came alone, or took long after one that was
 *      quick.  In a batch these still wait there: READs of a part of a store's
 *      block, leaves that have to be read, WRITEs for which a store has to sync
 *      to get space, and everything on a temporary export.
 * (T5) Memory is bounded and nobody waits for it: a client has its buffers and
 *      fewer than TX_HANDED_OVER + TX_BATCH requests with workers.  The buffers
 *      that these own are not more than config.threads, with up to TX_PIECE
 *      bytes each.  Of the other requests as many are done at a time, and then
 *      hold the extents of a BLOCK_STATUS, 2 MiB at most, until they are
 *      answered. */

/* ---- Replies ------------------------------------------------------------- */

/* Writes all of a reply but its data to p[TX_HEAD_MAX]: its mode, its outcome
 * and its command decide what it looks like.  Returns the number of bytes: 0
 * for a BLOCK_STATUS, whose data is whole chunks, and for all pieces of a long
 * simple reply but the first. */
static size_t tx_put_head(unsigned char *p, const struct nbdserve_req *r) {
  int is_read = r->type == NBD_CMD_READ;
  int needs_chunk = r->mode == MODE_EXTENDED || is_read || r->err;
  int is_simple = r->mode == MODE_SIMPLE || !needs_chunk;
  if (r->type == NBD_CMD_BLOCK_STATUS && !r->err) return 0;
  if (is_simple && is_read && r->off != r->client_off) return 0;
  if (is_simple) {
    u_put32(p, NBD_SIMPLE_REPLY_MAGIC);
    u_put32(p + 4, wire_error(r));
    u_put64(p + 8, r->cookie);
    return WIRE_SIMPLE_REPLY_LEN;
  }
  unsigned char *payload = p + wire_chunk_len(r->mode);
  enum nbd_reply_type type = NBD_REPLY_TYPE_NONE;
  size_t n = 0; /* bytes of payload that are written here */
  if (r->err) {
    const char *text = r->refused ? r->refused : strerror(-r->err);
    size_t len = (size_t)u_min(strlen(text), TX_ERROR_TEXT);
    type = NBD_REPLY_TYPE_ERROR;
    u_put32(payload, wire_error(r));
    u_put16(payload + 4, (unsigned)len);
    memcpy(payload + WIRE_ERROR_LEN, text, len);
    n = WIRE_ERROR_LEN + len;
    if (r->err_has_off) {
      type = NBD_REPLY_TYPE_ERROR_OFFSET;
      u_put64(payload + n, r->err_off);
      n += WIRE_OFFSET_LEN;
    }
  } else if (is_read && r->len) {
    type = NBD_REPLY_TYPE_OFFSET_DATA;
    u_put64(payload, r->off);
    n = WIRE_OFFSET_LEN;
    if (!r->data_len) {
      type = NBD_REPLY_TYPE_OFFSET_HOLE;
      u_put32(payload + n, (uint32_t)r->len);
      n += 4;
    }
  }
  assert(payload + n <= p + TX_HEAD_MAX);
  wire_put_chunk(p, r, type, n + r->data_len);
  return (size_t)(payload - p) + n;
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
  if (!p || !len) return;
  assert((size_t)out->n < COUNT_OF(out->v));
  if (last && (unsigned char *)last->iov_base + last->iov_len == p)
    last->iov_len += len;
  else
    out->v[out->n++] = (struct iovec){p, len};
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
    assert(r->state == REQ_DONE && (!r->err || !r->data_len));
    if (out->heads_len + TX_HEAD_MAX > sizeof out->heads) break;
    if ((size_t)out->n + 2 > COUNT_OF(out->v)) break;
    /* In place of a short READ a hole saves too little.  Where there is data,
     * u_is_zero mostly finds it at once. */
    int is_read = r->type == NBD_CMD_READ && !r->err;
    int is_hole = is_read && r->mode != MODE_SIMPLE && r->len >= 512 &&
                  r->buf && u_is_zero(r->buf, (size_t)r->len);
    if (is_read) r->data_len = is_hole ? 0 : (size_t)r->len;
    int is_in_front = is_read && r->data_len && r->buf;
    unsigned char *head = out->heads + out->heads_len;
    if (is_in_front) head = r->buf - wire_read_head_len(r->mode);
    size_t len = tx_put_head(head, r);
    if (!is_in_front) out->heads_len += len;
    tx_add_piece(out, head, len);
    tx_add_piece(out, r->buf, r->data_len);
  }
  return r;
}

/* Sends the replies of a list, in as few sends as possible.  spliced: bytes in
 * the pipe, which are the data of the list's only request.  0 or -errno. */
static int tx_send_all(struct conn *c, struct nbdserve_req *list,
                       size_t spliced) {
  struct tx_out out;
  int err = 0;
  while (list && !err) {
    list = tx_gather(&out, list);
    assert((out.n > 0 || spliced) && out.heads_len <= sizeof out.heads);
    err = conn_send(c, out.v, out.n, spliced);
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
  if (nth_failure > EX_LOGGED) return;
  const char *outcome = "ok";
  if (r->err) outcome = r->refused ? r->refused : strerror(-r->err);
  conn_log(c, level, "%s (%u) flags=0x%x off=%" PRIu64 " len=%" PRIu64 ": %s%s",
           cmd ? cmd->name : "?", r->type, r->flags, r->client_off, r->len,
           outcome,
           nth_failure == EX_LOGGED ? "; further failures are not logged" : "");
}

/* Counts and logs what is answered, and tells the host's `after`; mostly before
 * it is sent, so that a client which has its reply finds it counted. */
static void tx_account(struct conn *c, const struct nbdserve_req *list) {
  const struct nbdserve_config *k = &c->s->config;
  struct nbdserve_stats *stats = &c->s->totals;
  const struct nbdserve_req *r;
  os_lock(&c->s->lock);
  for (r = list; r; r = r->next) {
    stats->requests++;
    if (r->err) stats->errors++;
    if (!r->err && r->type == NBD_CMD_READ) stats->bytes_read += r->len;
    if (!r->err && r->type == NBD_CMD_WRITE) stats->bytes_written += r->len;
  }
  os_unlock(&c->s->lock);
  for (r = list; r; r = r->next) {
    tx_log(c, r);
    if (k->after)
      k->after(k->ctx, r->type, r->client_off, r->len, r->err,
               os_now_ns() - r->begun_ns);
  }
}

/* Gives a request that is handed over a buffer for its data, of TX_PIECE bytes
 * behind room for a head.  Waits while as many are owned as there may be
 * workers (T5).  False: there is no memory.  A client keeps some: the
 * system would have to clear each page of a new one.  What is not used is not
 * there, so all may have the same size. */
static int tx_take_buffer(struct conn *c, struct nbdserve_req *r) {
  assert(!r->owned);
  os_lock(&c->queue_lock);
  c->reader_waits = 1;
  while (c->nbuffers >= c->s->config.threads) /* (T5) */
    os_wait(&c->queue_lock);
  c->reader_waits = 0;
  if (c->nspares > 0) r->owned = c->spare[--c->nspares];
  if (!r->owned) r->owned = NBDSERVE_MALLOC(TX_HEAD_ROOM + TX_PIECE);
  if (r->owned) c->nbuffers++;
  os_unlock(&c->queue_lock);
  if (r->owned) r->buf = (unsigned char *)r->owned + TX_HEAD_ROOM;
  return r->owned != NULL;
}

/* Gives back the buffer that a request owns, if it owns one.  That of a
 * BLOCK_STATUS has another size, and is not kept. */
static void tx_give_buffer(struct conn *c, const struct nbdserve_req *r) {
  if (!r->owned) return;
  os_lock(&c->queue_lock);
  assert(c->nspares <= TX_SPARES);
  int is_counted = r->type != NBD_CMD_BLOCK_STATUS;
  int is_kept = is_counted && c->nspares < TX_SPARES;
  assert(!is_counted || c->nbuffers > 0);
  if (is_counted) c->nbuffers--;
  if (is_kept) c->spare[c->nspares++] = r->owned;
  os_unlock(&c->queue_lock);
  if (!is_kept) NBDSERVE_FREE(r->owned);
}

/* Answers the requests of a list, which are DONE (T1), and gives back the
 * buffers that they own.  0, or -errno when the client is gone. */
static int tx_answer(struct conn *c, struct nbdserve_req *list) {
  if (!list) return 0;
  assert(c->export);
  tx_account(c, list);
  int err = tx_send_all(c, list, 0);
  for (; list; list = list->next)
    tx_give_buffer(c, list);
  return err;
}

/* ---- Executing ----------------------------------------------------------- */

/* Notes how a request went: DONE, or a flush is owed. */
static void tx_executed(struct conn *c, struct nbdserve_req *r) {
  assert(r->state == REQ_TODO && r->err <= 0);
  int is_native = (c->export->pub.flags & NBDSERVE_EXPORT_NATIVE_FUA) != 0;
  int owes_flush = !r->err && !is_native && ex_wants_fua(c->export, r);
  req_set_state(r, owes_flush ? REQ_TO_FLUSH : REQ_DONE);
}

/* Does a request, or a list of those that are TO_FLUSH, whatever is left to do:
 * DONE afterwards.  One flush is enough for the list.  `before` is asked for
 * each FLUSH; one that it refuses takes no part. */
static void tx_execute(struct conn *c, struct nbdserve_req *list) {
  struct nbdserve_req *r = list;
  if (r->state == REQ_TODO) {
    assert(!r->next);
    r->err = ex_ask_before(c->export, r);
    if (!r->err) r->err = ex_execute(c->export, r);
    tx_executed(c, r);
  }
  if (r->state == REQ_DONE) return;
  int wanted = 0;
  uint64_t begun = os_now_ns(); /* `before` may take its time, too */
  for (; r; r = r->next) {
    assert(r->state == REQ_TO_FLUSH && !r->err);
    if (r->type == NBD_CMD_FLUSH) r->err = ex_ask_before(c->export, r);
    if (!r->err) wanted = 1;
  }
  int err = wanted ? ex_flush(c->export) : 0;
  os_lock(&c->queue_lock);
  c->is_flush_quick = wanted && os_now_ns() - begun < TX_QUICK_NS;
  os_unlock(&c->queue_lock);
  for (r = list; r; r = r->next) {
    if (!r->err) r->err = err;
    req_set_state(r, REQ_DONE);
  }
}

/* ---- Workers ----------------------------------------------------------------
 * They run while the client has work for them: started one by one when there is
 * more to do than idle workers, up to config.threads. */

/* The client's thread waits until fewer than `most` requests are with workers,
 * and, once the connection is closing, until there are no workers.  The caller
 * holds queue_lock. */
static void tx_wait_for_workers(struct conn *c, unsigned most) {
  c->reader_waits = 1;
  while (c->nhanded_over >= most || (c->closing && c->nworkers > 0))
    os_wait(&c->queue_lock);
  c->reader_waits = 0;
}

/* Takes what a worker does next, waiting for it: a list from the queue, or all
 * that wait for a flush.  NULL: there was nothing to do for TX_IDLE_MS, or the
 * connection ends and there is nothing left; if flushes are left while another
 * worker flushes, that one takes them next.  (The time limit also covers
 * a wake-up that is lost, which is a bug of some versions of glibc.)  The
 * caller holds queue_lock. */
static struct nbdserve_req *tx_take_work(struct conn *c) {
  int64_t until = os_now_ms() + TX_IDLE_MS;
  for (;;) {
    struct nbdserve_req *work = c->queue;
    if (c->to_flush && !c->flush_at_work) {
      work = c->to_flush;
      c->to_flush = NULL;
      c->flush_at_work = 1;
    } else if (work) {
      c->queue = work->next_job;
      if (!c->queue) c->queue_end = &c->queue;
      c->nqueue--;
    }
    if (work) return work;
    if (c->closing || os_now_ms() >= until) return NULL;
    c->nidle++;
    os_wait_ms(&c->queue_lock, TX_IDLE_MS);
    c->nidle--;
  }
}

/* Does and answers a list of READs that have to wait.  The medium has been
 * asked for all of them, so mostly one wait brings several.  What is done is
 * answered before the next wait; then the list is joined again, for the caller,
 * who walks all of it. */
static void tx_do_reads(struct conn *c, struct nbdserve_req *list) {
  struct nbdserve_req *before = NULL;
  for (struct nbdserve_req *r = list; r; before = r, r = r->next) {
    assert(r->type == NBD_CMD_READ && c->run_batch);
    c->run_batch(c->export->pub.ctx, r, 1);
    if (r->err == -EAGAIN) {
      if (before) before->next = NULL;
      if (before) tx_answer(c, list);
      if (before) before->next = r;
      list = r;
      r->may_wait = 1;
      r->err = conn_send(c, NULL, 0, 0); /* it only tells */
      if (r->err)
        r->refused = "the client is gone"; /* nobody waits for it */
      else
        c->run_batch(c->export->pub.ctx, r, 1);
    }
    tx_executed(c, r);
  }
  tx_answer(c, list);
}

/* A worker of a client: does and answers what is handed over, until there has
 * been nothing for TX_IDLE_MS or the connection is closing. */
static void *tx_worker(void *conn) {
  struct conn *c = conn;
  struct nbdserve_req *list;
  os_lock(&c->queue_lock);
  while ((list = tx_take_work(c)) != NULL) {
    int flushes = list->state == REQ_TO_FLUSH;
    os_unlock(&c->queue_lock);
    if (list->type == NBD_CMD_READ && c->run_batch) {
      tx_do_reads(c, list);
    } else {
      tx_execute(c, list);
      tx_answer(c, list);
    }
    os_lock(&c->queue_lock);
    if (flushes) c->flush_at_work = 0;
    for (struct nbdserve_req *next; list; list = next) {
      next = list->next;
      assert(list->state == REQ_DONE && c->nhanded_over > 0);
      NBDSERVE_FREE(list);
      c->nhanded_over--;
    }
    if (c->reader_waits) os_wake_all(&c->queue_lock);
  }
  assert(c->nworkers > 0);
  c->nworkers--;
  if (c->reader_waits) os_wake_all(&c->queue_lock);
  os_unlock(&c->queue_lock);
  return NULL;
}

/* Hands a list of requests, which are TODO or TO_FLUSH, over to a worker:
 * copies of them, and the buffers that they own.  Waits while too many are
 * handed over (T5).  False: there is no worker or no memory, and the caller has
 * to do them. */
static int tx_hand_over(struct conn *c, struct nbdserve_req *list) {
  unsigned most = c->s->config.threads;
  int flushes = list->state == REQ_TO_FLUSH;
  struct nbdserve_req *copies = NULL;
  struct nbdserve_req **end = &copies;
  struct nbdserve_req *r = list;
  assert(flushes || list->state == REQ_TODO);
  if (most == 1) return 0; /* this thread does all itself */
  for (; r && (*end = NBDSERVE_MALLOC(sizeof *r)) != NULL; r = r->next) {
    **end = *r;
    /* The READs of a list lie in the buffer of the last one.  Others that own
     * none had their data in rbuf, and it is written; a flush needs none. */
    if (r->type != NBD_CMD_READ && !r->owned) (*end)->buf = NULL;
    end = &(*end)->next;
  }
  *end = NULL;
  os_lock(&c->queue_lock);
  tx_wait_for_workers(c, TX_HANDED_OVER);
  /* Jobs that will wait are: each list in the queue, and all flushes together,
   * unless a flush is running, whose worker takes the next ones.  If these are
   * more than the workers that are idle, one is started. */
  unsigned jobs = c->nqueue + (flushes ? 0 : 1);
  if (!c->flush_at_work && (c->to_flush || flushes)) jobs++;
  assert(c->nidle <= c->nworkers && c->nworkers <= most);
  if (jobs > c->nidle && c->nworkers < most && os_thread(tx_worker, c) == 0)
    c->nworkers++;
  int is_taken = !r && c->nworkers > 0;
  if (is_taken && flushes) {
    *end = c->to_flush;
    c->to_flush = copies;
  } else if (is_taken) {
    *c->queue_end = copies;
    c->queue_end = &copies->next_job;
    c->nqueue++;
  }
  for (r = list; is_taken && r; r = r->next) {
    c->nhanded_over++;
    req_set_state(r, REQ_HANDED_OVER);
  }
  if (is_taken) os_wake_one(&c->queue_lock); /* this thread does not wait */
  os_unlock(&c->queue_lock);
  for (struct nbdserve_req *next; !is_taken && copies; copies = next) {
    next = copies->next;
    NBDSERVE_FREE(copies);
  }
  return is_taken;
}

/* ---- The batch ----------------------------------------------------------- */

/* Does the READs of the batch that have to wait for the medium: hands them over
 * as one list, with a buffer for all of them, which the last one owns, as it is
 * answered last; or does and answers them here if there is no worker or no
 * memory.  Either way the batch has nothing left to do for them. */
static void tx_read_later(struct conn *c, struct nbdserve_req *list) {
  struct nbdserve_req *last = list;
  while (last->next)
    last = last->next;
  unsigned char *p = tx_take_buffer(c, last) ? last->owned : NULL;
  for (struct nbdserve_req *r = list; p && r; r = r->next) {
    r->buf = p + wire_read_head_len(c->mode);
    p = r->buf + r->len;
  }
  assert(!p || p <= (unsigned char *)last->owned + TX_SLOTS);
  if (p && tx_hand_over(c, list)) return;
  tx_do_reads(c, list);
  for (struct nbdserve_req *r = list; r; r = r->next)
    r->state = REQ_HANDED_OVER;
}

/* Flushes for those of the batch that are TO_FLUSH, or hands them over: then
 * they are HANDED_OVER.
 *
 * They are done here if the last flush took less time than a hand-over, or if
 * the client has no other request under way.  If another one has arrived during
 * such a flush, and so was held up, the next flushes go to workers, if there
 * are any (on a pipe nobody can look). */
static void tx_flush(struct conn *c, struct nbdserve_req *list) {
  char byte;
  os_lock(&c->queue_lock);
  int is_quick = c->is_flush_quick;
  int is_alone = !c->nhanded_over;
  os_unlock(&c->queue_lock);
  if (c->nbatch > 1 || c->rbuf_pos < c->rbuf_end || c->is_past_half)
    is_alone = 0;
  if (!is_quick && c->flushes_to_workers) {
    c->flushes_to_workers--;
    is_alone = 0;
  }
  if (!is_quick && !is_alone && tx_hand_over(c, list)) return;
  tx_execute(c, list);
  if (is_alone && recv(c->io.in, &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0)
    c->flushes_to_workers = TX_FLUSHES;
}

/* The requests of the batch that are in a state, as a list. */
static struct nbdserve_req *tx_pick(struct conn *c, enum req_state state) {
  struct nbdserve_req *list = NULL;
  struct nbdserve_req **end = &list;
  for (size_t i = 0; i < c->nbatch; i++) {
    if (c->batch[i].state != state) continue;
    *end = &c->batch[i];
    end = &c->batch[i].next;
  }
  *end = NULL;
  return list;
}

/* Does the batch, or hands over what is for workers (T4), and answers the rest.
 * READs and WRITEs that stand in a row are done with one call of run_batch.
 * What is still TODO then are READs that have to wait for the medium.  0, or
 * -errno to close. */
static int tx_run_batch(struct conn *c) {
  size_t i = 0;
  while (i < c->nbatch) {
    struct nbdserve_req *r = &c->batch[i++];
    if (r->state != REQ_TODO) continue;
    if (!c->run_batch || !req_moves_data(r)) {
      if (!req_moves_data(r) && tx_hand_over(c, r)) continue;
      tx_execute(c, r);
      if (r->type != NBD_CMD_BLOCK_STATUS) continue;
      /* (T5): not many such replies wait for the end of the batch. */
      tx_answer(c, r);
      r->state = REQ_HANDED_OVER;
      continue;
    }
    while (i < c->nbatch && c->batch[i].state == REQ_TODO &&
           req_moves_data(&c->batch[i]))
      i++;
    c->run_batch(c->export->pub.ctx, r, (size_t)(&c->batch[i] - r));
    for (; r < &c->batch[i]; r++)
      if (r->err != -EAGAIN || r->may_wait) tx_executed(c, r);
  }
  struct nbdserve_req *waiting = tx_pick(c, REQ_TODO);
  if (waiting) tx_read_later(c, waiting);
  struct nbdserve_req *to_flush = tx_pick(c, REQ_TO_FLUSH);
  if (to_flush) tx_flush(c, to_flush); /* (T3) */
  struct nbdserve_req *done = tx_pick(c, REQ_DONE);
  c->nbatch = 0;
  c->wbuf_used = 0;
  return tx_answer(c, done);
}

/* ---- What is not done in the batch ------------------------------------------
 * These run when the batch is done, so wbuf is free, and all of rbuf but the
 * payload of this request, of which the first bytes may have come. */

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
  if (r->state != REQ_DONE && tx_hand_over(c, r)) return 0;
  tx_execute(c, r);
  return tx_answer(c, r);
}

/* Does a long WRITE, piece by piece as they come, or only receives the payload
 * of a request that was refused.  After an error the rest is thrown away. */
static int tx_write_in_pieces(struct conn *c, struct nbdserve_req *r) {
  struct nbdserve_req piece = *r;
  int is_refused = r->state == REQ_DONE;
  if (!is_refused) r->err = ex_ask_before(c->export, r);
  assert(is_refused || r->payload == r->len);
  piece.buf = c->wbuf;
  c->after_long_write = 1;
  for (uint64_t left = r->payload; left > 0; left -= piece.len) {
    piece.len = u_min(left, TX_PIECE);
    int err = tx_recv_payload(c, piece.buf, (size_t)piece.len);
    if (err) return err;
    if (!r->err) r->err = ex_execute(c->export, &piece);
    piece.off += piece.len;
  }
  if (!is_refused) tx_executed(c, r);
  return tx_finish(c, r);
}

/* Throws the pipe away, and what may be in it. */
static void tx_close_pipe(struct conn *c) {
  if (*c->pipe < 0) return;
  close(c->pipe[0]);
  close(c->pipe[1]);
  c->pipe[0] = -1;
}

/* Moves the data of a READ, or of a piece of it, to the pipe, if the backend
 * can do that and the data is in memory.  From there it is sent without a copy,
 * for a third of the time.  A copy is faster for short ones, and mostly over
 * TCP (loopback, Linux 6.18).  Returns the length, or 0: then it is to be read.
 * If only a part can be moved, that was the last try of this client. */
static size_t tx_splice(struct conn *c, const struct nbdserve_req *piece) {
  const struct nbdserve_ops *ops = c->export->pub.ops;
  size_t len = (size_t)piece->len;
  assert(piece->type == NBD_CMD_READ && len <= TX_PIECE);
  if (!c->run_batch || !ops->splice || len < TX_SPLICE_MIN) return 0;
  /* A socket of the host's stays as it is, and its thread may take SIGPIPE. */
  if (c->fd < 0 || c->is_tcp) return 0;
  if (*c->pipe < 0) {
    int room = c->pipe_room ? -1 : os_splice_pipe(c->pipe, TX_PIECE, c->io.out);
    c->pipe_room = room > 0 ? (size_t)room : 1; /* 1: it is not tried again */
    if (room < TX_SPLICE_MIN) tx_close_pipe(c);
  }
  if (len > c->pipe_room) return 0;
  size_t n = ops->splice(c->export->pub.ctx, c->pipe[1], piece->off, len);
  if (n && n < len) tx_close_pipe(c);
  return n == len ? len : 0;
}

/* Does a long READ piece by piece, up to the first error, and sends each: as a
 * chunk of a structured reply, or a part of a simple one.  The head of a simple
 * reply claims success before the data comes, so all is read before, once, and
 * nothing kept: what fails then can still be said.  If there are several
 * pieces, an error says at which.  0, or -errno to close. */
static int tx_read_in_pieces(struct conn *c, struct nbdserve_req *r) {
  int is_long = r->len > TX_PIECE;
  int sends = r->mode != MODE_SIMPLE || !is_long;
  struct nbdserve_req piece = *r;
  req_set_state(&piece, REQ_DONE); /* tx_gather takes only these */
  r->err_has_off = is_long;
  r->err_off = r->off;
  r->err = ex_ask_before(c->export, r);
  if (!sends && !r->err) {
    os_lock(&c->queue_lock);
    tx_wait_for_workers(c, 1); /* a simple reply is in one piece */
    os_unlock(&c->queue_lock);
  }
  for (; sends <= 1 && !r->err; sends++) {
    piece.off = r->off;
    for (uint64_t left = r->len; left > 0 && !r->err; left -= piece.len) {
      piece.len = u_min(left, TX_PIECE);
      piece.more_chunks = piece.len < left;
      /* proto.md: chunks should end at multiples of 512, where possible. */
      if (piece.more_chunks) piece.len -= (piece.off + piece.len) % 512;
      assert(piece.len > 0 && piece.len <= left);
      r->err_off = piece.off;
      size_t spliced = sends ? tx_splice(c, &piece) : 0;
      piece.buf = spliced ? NULL : c->wbuf + TX_HEAD_ROOM;
      r->err = spliced ? 0 : ex_execute(c->export, &piece);
      int err = sends && !r->err ? tx_send_all(c, &piece, spliced) : 0;
      /* A simple reply that has begun cannot be taken back (proto.md). */
      int is_begun = sends && r->mode == MODE_SIMPLE && left < r->len;
      if (r->err && is_begun) err = r->err;
      if (err) return err;
      piece.off += piece.len;
    }
  }
  req_set_state(r, REQ_DONE);
  if (r->err) return tx_answer(c, r);
  tx_account(c, r); /* all was sent */
  return 0;
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

/* Checks a request against all that was negotiated: one rule, one `if`; the
 * first that is broken counts.  A new rule goes here.  0, or -errno if the
 * request was refused. */
static int tx_validate(const struct conn *c, struct nbdserve_req *r) {
  const struct wire_cmd *cmd = wire_cmd(r->type);
  if (!cmd) return tx_refuse(r, -EINVAL, "unknown command");
  int is_status = r->type == NBD_CMD_BLOCK_STATUS;
  unsigned needed = cmd->exposed_by;
  if (r->flags & NBD_CMD_FLAG_FUA) needed |= NBD_FLAG_SEND_FUA;
  if (r->flags & NBD_CMD_FLAG_DF) needed |= NBD_FLAG_SEND_DF;
  if (r->flags & NBD_CMD_FLAG_FAST_ZERO) needed |= NBD_FLAG_SEND_FAST_ZERO;
  unsigned lacking = needed & ~c->info.flags;
  unsigned any = NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_PAYLOAD_LEN;
  unsigned stray = r->flags & ~(cmd->flags | any);
  int has_range = cmd->err_beyond != 0;
  int takes_payload = r->type == NBD_CMD_WRITE && c->mode == MODE_EXTENDED;
  if (is_status) takes_payload = c->info.flags & NBD_FLAG_BLOCK_STATUS_PAYLOAD;
  if (r->flags & NBD_CMD_FLAG_PAYLOAD_LEN && !takes_payload)
    return tx_refuse(r, -EINVAL, "the command takes no payload");
  if (cmd->writes && (c->info.flags & NBD_FLAG_READ_ONLY))
    return tx_refuse(r, -EPERM, "the export is read-only");
  if (r->type == NBD_CMD_WRITE && r->payload != r->len)
    return tx_refuse(r, -EINVAL, "NBD_CMD_FLAG_PAYLOAD_LEN is missing");
  if (has_range && (r->off > c->info.size || r->len > c->info.size - r->off))
    return tx_refuse(r, cmd->err_beyond, "beyond the end of the export");
  if (is_status && !c->contexts.n)
    return tx_refuse(r, -EINVAL, "no metadata context was negotiated");
  if (lacking) return tx_refuse(r, -EINVAL, "the export does not offer this");
  if (stray) return tx_refuse(r, -EINVAL, "flag does not apply");
  if (has_range && (r->off | r->len) & (c->info.min_block - 1))
    return tx_refuse(r, -EINVAL, "no multiple of the minimum block size");
  if (req_moves_data(r) && r->len > c->info.max_request)
    return tx_refuse(r, -EINVAL, "longer than the maximum payload size");
  if (is_status && !r->len)
    return tx_refuse(r, -EINVAL, "nothing to report on");
  if (r->flags & NBD_CMD_FLAG_DF && r->len > TX_PIECE)
    return tx_refuse(r, -EOVERFLOW, "too long for a single chunk");
  return 0;
}

/* Does a request, or sees to it that it is done later, as the table at the head
 * of the section says.  0, or -errno to close. */
static int tx_dispatch(struct conn *c, struct nbdserve_req *r) {
  int moves_data = r->state == REQ_TODO && req_moves_data(r);
  int is_long_write = r->type == NBD_CMD_WRITE && r->len > TX_IN_BATCH_MAX;
  /* Is it handed over with its data?  On a host's backend, which may take its
   * time, each READ and WRITE is; in a store a long WRITE, so that the data of
   * several is received, hashed and written at the same time. */
  int has_own_buffer =
      moves_data && c->s->config.threads > 1 && r->len <= TX_PIECE;
  if (c->run_batch && !(is_long_write && c->export->pub.ops->hashes))
    has_own_buffer = 0;
  uint64_t data = moves_data ? r->len : r->payload; /* of a READ, too */
  int is_batched = !has_own_buffer && data <= TX_IN_BATCH_MAX;
  size_t slot = 0; /* of a READ in the batch: bytes of wbuf */
  if (is_batched && moves_data && r->type == NBD_CMD_READ)
    slot = wire_read_head_len(c->mode) + (size_t)r->len;
  assert(slot <= TX_SLOTS);
  size_t spliced = slot ? tx_splice(c, r) : 0;
  /* When the batch is done, wbuf and what came in rbuf can be used again. */
  int fits = c->nbatch < TX_BATCH && c->wbuf_used + slot <= TX_SLOTS;
  int err = is_batched && fits && !spliced ? 0 : tx_run_batch(c);
  if (err) return err;
  if (spliced) {
    req_set_state(r, REQ_DONE);
    tx_account(c, r);
    return tx_send_all(c, r, spliced);
  }
  if (is_batched) {
    r->buf = c->rbuf + c->rbuf_pos; /* the payload is all there */
    c->rbuf_pos += (size_t)r->payload;
    c->wbuf_used += slot;
    if (slot) r->buf = c->wbuf + c->wbuf_used - r->len;
    c->batch[c->nbatch++] = *r;
    return 0;
  }
  if (!has_own_buffer || !tx_take_buffer(c, r)) /* or there is none */
    return r->payload ? tx_write_in_pieces(c, r) : tx_read_in_pieces(c, r);
  if (r->payload) err = tx_recv_payload(c, r->buf, (size_t)r->payload);
  if (!err) return tx_finish(c, r);
  tx_give_buffer(c, r);
  return err;
}

/* Notes which contexts a BLOCK_STATUS asks for: all that are selected, or those
 * that its payload names, each once. */
static void tx_get_contexts(const struct conn *c, struct nbdserve_req *r,
                            const unsigned char *payload) {
  const struct wire_contexts *selected = r->contexts = &c->contexts;
  r->asked = (1u << selected->n) - 1;
  if (!r->payload) return;
  int bad = r->payload < 12 || r->payload % 4;
  if (r->payload > 8 + 4 * selected->n) bad = 1; /* nor is it all there */
  r->asked = 0;
  for (size_t i = 8; i < r->payload && !bad; i += 4) {
    uint32_t id = u_get32(payload + i);
    unsigned k = 0;
    while (k < selected->n && wire_context_id(selected->number[k]) != id)
      k++;
    bad = k == selected->n || r->asked >> k & 1;
    r->asked |= 1u << k;
  }
  r->len = bad ? 0 : u_get64(payload); /* 0 is refused */
}

/* Takes the next request out of rbuf.  As enum conn_step says. */
static int tx_next_request(struct conn *c) {
  const unsigned char *p = c->rbuf + c->rbuf_pos;
  assert(c->rbuf_pos <= c->rbuf_end && c->nbatch <= TX_BATCH);
  size_t here = c->rbuf_end - c->rbuf_pos;
  int extended = c->mode == MODE_EXTENDED;
  size_t head = extended ? WIRE_EXT_REQUEST_LEN : WIRE_REQUEST_LEN;
  c->needed = head;
  if (here < head) return CONN_NEEDS_MORE;
  struct nbdserve_req r = {.mode = c->mode, .cookie = u_get64(p + 8)};
  r.flags = u_get16(p + 4);
  r.type = u_get16(p + 6);
  r.off = r.client_off = u_get64(p + 16);
  r.len = extended ? u_get64(p + 24) : u_get32(p + 24);
  int has_payload =
      extended ? r.flags & NBD_CMD_FLAG_PAYLOAD_LEN : r.type == NBD_CMD_WRITE;
  if (has_payload) r.payload = r.len;
  r.may_wait = r.type != NBD_CMD_READ || c->s->config.threads == 1;
  /* A payload beyond the limit is not even skipped: the connection ends. */
  uint64_t most = extended ? c->info.max_request : NBDSERVE_MAX_REQUEST;
  uint32_t magic = extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC;
  if (u_get32(p) != magic || r.payload > most) {
    conn_log(c, NBDSERVE_LOG_INFO, "request magic 0x%08" PRIx32 "; closed",
             u_get32(p));
    return -EPROTO;
  }
  if (r.type == NBD_CMD_DISC) return CONN_LEFT;
  if (r.payload <= TX_IN_BATCH_MAX) c->needed += (size_t)r.payload;
  if (here < c->needed) return CONN_NEEDS_MORE;
  if (r.type == NBD_CMD_FLUSH) r.off = r.len = 0; /* reserved (proto.md) */
  if (r.type == NBD_CMD_BLOCK_STATUS) tx_get_contexts(c, &r, p + head);
  if (!tx_validate(c, &r) && !r.len) /* only a flush, or nothing */
    req_set_state(&r, r.type == NBD_CMD_FLUSH ? REQ_TO_FLUSH : REQ_DONE);
  c->rbuf_pos += head;
  if (c->s->config.after) r.begun_ns = os_now_ns();
  return tx_dispatch(c, &r);
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
   * there, so that is a few heads at most. */
  if (c->after_long_write && !left) room = 4096;
  c->after_long_write = 0;
  size_t least = left ? c->needed - left : 1; /* all of it may stay away */
  ssize_t n = io_recv(&c->io, c->rbuf + left, least, room);
  /* Idle, as long as it likes; unless a worker could not send to it, which
   * shutdown() tells us only if the replies go over the same socket. */
  if (!left && n == -ETIMEDOUT) return conn_send(c, NULL, 0, 0);
  if (n == 0) return left ? -EPIPE : CONN_LEFT;
  if (n < 0) return (int)n;
  assert((size_t)n <= room);
  c->rbuf_end += (size_t)n;
  c->is_past_half = 0;
  return 0;
}

/* Should the batch be done before rbuf is empty?  Once in a round, which is all
 * that a recv() brought: halfway through it, so that the client has answers to
 * work on while the rest is done here, and sends more meanwhile.  Otherwise the
 * two would take turns, one always waiting for the other.
 *
 * Not if other clients keep the processors busy.  How many do is estimated:
 * each of them has a round for one of ours, on average, so the rounds between
 * two of ours are counted.  And each takes two processors: one for its thread
 * here, one for itself, as it mostly is on this machine, too.  Nor are WRITEs
 * into a store divided: most of what they cost, they cost once for all of a
 * batch.  What moves no data is mostly done by workers. */
static int tx_answers_early(struct conn *c) {
  if (c->is_past_half || c->nbatch < 2 || c->rbuf_pos < c->rbuf_end / 2)
    return 0;
  const struct nbdserve_req *last = &c->batch[c->nbatch - 1];
  if (!req_moves_data(last)) return 0;
  c->is_past_half = 1;
  os_lock(&c->s->lock);
  uint32_t others = c->s->rounds - c->rounds; /* rounds since our last one */
  c->rounds = ++c->s->rounds;
  os_unlock(&c->s->lock);
  c->busy += u_min(others, 64) - c->busy / 8;
  if (last->type == NBD_CMD_WRITE && c->export->pub.ops->hashes) return 0;
  return (long)(c->busy / 8) < c->s->cpus / 2;
}

/* The transmission phase, to its end: CONN_LEFT or -errno. */
static int tx_run(struct conn *c) {
  int step;
  assert(c->export && !c->nbatch && !c->wbuf_used && !c->io.deadline);
  conn_log(c, NBDSERVE_LOG_INFO, "export '%s', %" PRIu64 " bytes%s",
           c->export->pub.name, c->info.size,
           c->info.flags & NBD_FLAG_READ_ONLY ? ", read-only" : "");
  do {
    step = tx_next_request(c);
    /* Also if nothing more can be taken from rbuf, or the phase ends. */
    int err = step || tx_answers_early(c) ? tx_run_batch(c) : 0;
    if (err) step = err;
    if (step == CONN_NEEDS_MORE) step = tx_receive(c);
  } while (!step);
  os_lock(&c->queue_lock); /* DRAINING: the workers do what is left, and end */
  c->closing = 1;
  os_wake_all(&c->queue_lock);
  tx_wait_for_workers(c, 1);
  assert(!c->queue && !c->to_flush && !c->nhanded_over);
  os_unlock(&c->queue_lock);
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
  FLAT_PAGE = 4096,  /* bytes of a page of memory, or a part of one */
  FLAT_MAX_IOV = 64, /* neighbouring requests that go into one system call */
  FLAT_OVERLAY_BLOCK = 65536, /* bytes that come to the overlay as a whole */
  FLAT_REGIONS = 16,          /* of blocks, each with a lock */
  FLAT_FAILED = 1 << 30       /* in struct flat: a sync has failed (F1) */
};

/* An open export: nbdserve_flat_open makes it, flat_close frees it.
 *
 *   members         written by          read by                  lock
 *   own ... size    nbdserve_flat_open  everybody                none
 *   known           FLUSH, TRIM, ZEROES  all that writes          lock
 *   in_overlay      WRITE               READ, WRITE              lock
 *
 * The lock is held for the moment that it takes to look or to set a bit. */
struct flat {
  struct ex_batched own; /* must come first: ex_batched_read looks there */

  /* Fixed while the export is open: no lock is needed. */
  int fd;          /* the target; ours to close */
  int overlay_fd;  /* the overlay, ours to close; -1: writes go to the target */
  int follows_end; /* the export ends where the target ends, even if it grows */
  int can_read_now; /* OS_READ_NOW works with the target */
  uint64_t offset;  /* bytes of the target in front of the export */
  uint64_t size;    /* bytes of the export when it was opened */

  /* What only becomes more: bits that are set for good, by flat_mark. */
  struct os_monitor lock; /* guards them */
  uint32_t known;         /* FLAT_FAILED, and 1 << mode for each mode that
                             os_fallocate turned out to lack here (F2) */
  /* Bit N % 32 of word N / 32: block N is in the overlay.  NULL: there is none;
   * else the export is temporary, and no request changes the target. */
  uint32_t *in_overlay;
  /* Block N is brought over under region[N % FLAT_REGIONS], so that of two
   * WRITEs to it none is lost. */
  struct os_monitor region[FLAT_REGIONS];
};
STATIC_ASSERT(modes_of_fallocate_have_bits, OS_ZERO_RANGE < 30);

/* Sets bits for good in f->known or in a word of f->in_overlay, and returns
 * what is then set there; bits is 0 to look only.  Takes the lock. */
static uint32_t flat_mark(struct flat *f, uint32_t *word, uint32_t bits) {
  (void)f;
  os_lock(&f->lock);
  *word |= bits;
  bits = *word;
  os_unlock(&f->lock);
  return bits;
}

/* ---- The overlay of a temporary export ---------------------------------- */

/* Copies a block of the target to the overlay.  The last block of an export may
 * be shorter than the others.  The caller holds the lock of its region. */
static int overlay_copy(struct flat *f, uint64_t block) {
  unsigned char data[FLAT_OVERLAY_BLOCK];
  uint64_t start = block * FLAT_OVERLAY_BLOCK;
  assert(start < f->size);
  struct iovec in = {data, (size_t)u_min(sizeof data, f->size - start)};
  struct iovec out = in;
  int err = os_transfer(f->fd, OS_READ, &in, 1, f->offset + start);
  if (err) return err;
  return os_transfer(f->overlay_fd, OS_WRITE, &out, 1, start);
}

/* Reads or writes v, which lies at off, all in one block: a write in the
 * overlay, to which it brings the block first unless it fills it.  The block
 * counts as being there once all of that is done: who reads it until then reads
 * what it was before. */
static int overlay_move(struct flat *f, int how, struct iovec v, uint64_t off) {
  uint64_t block = off / FLAT_OVERLAY_BLOCK;
  uint32_t *word = &f->in_overlay[block / 32];
  uint32_t bit = 1u << block % 32;
  int err = 0;
  assert(v.iov_len > 0 && off < f->size);
  assert(v.iov_len <= FLAT_OVERLAY_BLOCK - off % FLAT_OVERLAY_BLOCK);
  if (flat_mark(f, word, 0) & bit)
    return os_transfer(f->overlay_fd, how, &v, 1, off);
  if (how == OS_READ) return os_transfer(f->fd, how, &v, 1, f->offset + off);
  os_lock(&f->region[block % FLAT_REGIONS]);
  if (v.iov_len < FLAT_OVERLAY_BLOCK && !(flat_mark(f, word, 0) & bit))
    err = overlay_copy(f, block);
  if (!err) err = os_transfer(f->overlay_fd, how, &v, 1, off);
  if (!err) flat_mark(f, word, bit);
  os_unlock(&f->region[block % FLAT_REGIONS]);
  return err;
}

/* Does a READ or WRITE block by block.  Returns 0 or the first error. */
static int overlay_do(struct flat *f, int how, const struct nbdserve_req *r) {
  int err = 0;
  assert(r->len <= f->size && r->off <= f->size - r->len);
  for (uint64_t done = 0, len; done < r->len && !err; done += len) {
    uint64_t off = r->off + done;
    len = u_min(FLAT_OVERLAY_BLOCK - off % FLAT_OVERLAY_BLOCK, r->len - done);
    struct iovec v = {r->buf + done, (size_t)len};
    err = overlay_move(f, how, v, off);
  }
  return err;
}

/* ---- Requests ----------------------------------------------------------- */

/* Does a run of requests with one system call, or more if that does less; of a
 * temporary export just one request. */
static int flat_transfer(struct flat *f, const struct nbdserve_req *reqs,
                         size_t nreqs) {
  struct iovec v[FLAT_MAX_IOV];
  int how = reqs->type == NBD_CMD_WRITE ? OS_WRITE : OS_READ;
  assert(nreqs > 0 && nreqs <= FLAT_MAX_IOV);
  if (f->in_overlay) return overlay_do(f, how, reqs);
  /* (F1) */
  if (how == OS_WRITE && flat_mark(f, &f->known, 0) & FLAT_FAILED) return -EIO;
  for (size_t i = 0; i < nreqs; i++) {
    v[i] = (struct iovec){reqs[i].buf, (size_t)reqs[i].len};
    assert(v[i].iov_len == reqs[i].len); /* there is a buffer of that size */
  }
  if (how == OS_READ && !reqs->may_wait && f->can_read_now) how = OS_READ_NOW;
  return os_transfer(f->fd, how, v, (int)nreqs, f->offset + reqs->off);
}

/* Is the page of the target at pos in memory, and not all zeroes?  Where nobody
 * can tell whether it is in memory, it is read. */
static int flat_has_page(const struct flat *f, uint64_t pos) {
  unsigned char page[FLAT_PAGE];
  struct iovec v = {page, sizeof page};
  int how = f->can_read_now ? OS_READ_NOW : OS_READ;
  if (os_transfer(f->fd, how, &v, 1, pos)) return 0;
  return !u_is_zero(page, sizeof page);
}

/* ops->splice: moves what it can of a range to a pipe, without a copy, and
 * returns how many bytes that is.  Not what may be a hole, which has a shorter
 * reply, nor what would have to be waited for: the first page and the last one
 * stand for all.  A page of a pipe holds one of the file, so these have to
 * begin together. */
static size_t flat_splice(void *ctx, int pipe, uint64_t off, uint64_t len) {
  struct flat *f = ctx;
  uint64_t pos = f->offset + off;
  uint64_t end = pos + len;
  ssize_t n = 1;
  assert(len >= FLAT_PAGE);
  if (f->in_overlay || pos % FLAT_PAGE) return 0;
  if (!flat_has_page(f, pos) || !flat_has_page(f, end - FLAT_PAGE)) return 0;
  while (pos < end && n > 0)
    n = os_splice(f->fd, &pos, pipe, (size_t)(end - pos));
  return (size_t)(pos + len - end);
}

/* Does READs and WRITEs, in their order, in the caller's thread, and sets the
 * error of each: the method of struct ex_batched.
 *
 * Clients that read or write a long range often cut it into requests that lie
 * one behind the other; such a run becomes one system call.  If it fails they
 * are repeated one by one, so that only those fail that fail by themselves. */
static void flat_batch(void *ctx, struct nbdserve_req *reqs, size_t nreqs) {
  struct flat *f = ctx;
  for (size_t run; nreqs > 0; reqs += run, nreqs -= run) {
    assert(reqs->type == NBD_CMD_READ || reqs->type == NBD_CMD_WRITE);
    run = 1;
    while (!f->in_overlay && run < nreqs && run < FLAT_MAX_IOV &&
           reqs[run].type == reqs->type &&
           reqs[run].off == reqs[run - 1].off + reqs[run - 1].len)
      run++;
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
  if (f->in_overlay) return 0;
  if (flat_mark(f, &f->known, 0) & FLAT_FAILED) return -EIO;
  int err = os_datasync(f->fd);
  if (err) flat_mark(f, &f->known, FLAT_FAILED);
  return err;
}

/* Changes the space behind a range of the export.  -EOPNOTSUPP: the caller must
 * do without, now (the range is not made of whole sectors of a device) or, as
 * is then remembered, always (F2). */
static int flat_allocate(struct flat *f, int mode, uint64_t off, uint64_t len) {
  if (f->in_overlay) return -EOPNOTSUPP; /* the target stays */
  assert(mode >= 0 && mode <= OS_ZERO_RANGE);
  uint32_t known = flat_mark(f, &f->known, 0);
  if (known & FLAT_FAILED) return -EIO; /* (F1): it is a write */
  if (known & 1u << mode) return -EOPNOTSUPP;
  int err = os_fallocate(f->fd, mode, f->offset + off, len);
  if (err == -EOPNOTSUPP) flat_mark(f, &f->known, 1u << mode); /* (F2) */
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
  os_advise(f->fd, POSIX_FADV_WILLNEED, f->offset + off, len);
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
  if (f->in_overlay) return 0;
  for (uint64_t next; pos < end; pos = next) {
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
  if (f->in_overlay) return u_min(size, f->size);
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
  close(f->overlay_fd); /* closing -1 does no harm */
  NBDSERVE_FREE(f->in_overlay);
  for (int i = 0; i < FLAT_REGIONS; i++)
    os_monitor_free(&f->region[i]);
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
    .splice = flat_splice,
    .size = flat_size,
};

/* ---- Opening ------------------------------------------------------------
 * One function a step; each fills its part of struct flat. */

/* Opens the target, and makes the file if it is missing and may be made.  Only
 * O_EXCL tells whether this call has made it, which (F4) must know; it follows
 * no link to where nothing is yet.  A new file is opened for writing in any
 * case, as it gets its size.
 *
 * The lock comes before all that looks at the file or changes it, so that of
 * several servers that start at once exactly one does.  Refused is what is
 * neither a file nor a block device, and a device that is to be written and
 * cannot.  A new or empty file gets its size.
 *
 * path is NULL for memory; writable: clients' writes go to the target; create:
 * the size for a new or empty file, 0 if none is made; *is_new: this call made
 * the file, and has it locked.  If another server was quicker to lock it, or it
 * has a size by now, which another one gave it that has ended, then the file
 * and its data are not ours. */
static int flat_open_target(struct flat *f, const char *path, int writable,
                            uint64_t create, int *is_new) {
  int flags = O_CLOEXEC | O_NOCTTY | O_NONBLOCK; /* a FIFO must not block */
  struct stat st = {0};
  int fd = path ? -1 : os_nameless_file(NULL);
  if (path && create) {
    fd = open(path, flags | O_RDWR | O_CREAT | O_EXCL, 0666);
    if (fd < 0 && errno != EEXIST) return -errno;
    *is_new = fd >= 0;
  }
  if (path && fd < 0) fd = open(path, flags | (writable ? O_RDWR : O_RDONLY));
  if (fd < 0) return path ? -errno : fd;
  f->fd = fd;
  int err = os_lock_file(fd, !writable);
  if (!err && fstat(fd, &st) < 0) err = -errno;
  if (err || st.st_size != 0) *is_new = 0;
  if (err) return err;
  if (S_ISDIR(st.st_mode)) return -EISDIR;
  if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) return -EINVAL;
  if (S_ISBLK(st.st_mode) && writable && os_is_readonly_device(fd))
    return -EROFS;
  if (!create || !S_ISREG(st.st_mode) || st.st_size != 0) return 0;
  if (ftruncate(fd, (off_t)create) < 0) return -errno;
  return path ? os_sync_new_file(fd, path) : 0;
}

/* Settles which part of the target is served.  -EINVAL: it is not inside. */
static int flat_find_slice(struct flat *f, uint64_t offset, uint64_t size) {
  off_t end = lseek(f->fd, 0, SEEK_END);
  if (end < 0) return -errno;
  if (offset > (uint64_t)end || size > (uint64_t)end - offset) return -EINVAL;
  f->offset = offset;
  f->size = size ? size : (uint64_t)end - offset;
  f->follows_end = !size;
  f->can_read_now = os_can_read_now(f->fd);
  assert(f->offset + f->size <= INT64_MAX); /* for os_transfer */
  return 0;
}

/* Makes the overlay of a temporary export in dir.  -EFBIG: its map would have
 * more bytes than `most`, which is what size_t holds: on a machine with
 * addresses of 32 bits a sparse file may well be too large. */
static int flat_make_overlay(struct flat *f, const char *dir, size_t most) {
  uint64_t len = (f->size / FLAT_OVERLAY_BLOCK / 32 + 1) * sizeof(uint32_t);
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
  struct nbdserve_flat o = {.flags = 0};
  if (options) o = *options;
  const char *file = strncmp(path, "mem:", 4) == 0 ? NULL : path;
  int is_new = 0;
  if (o.flags & ~(NBDSERVE_FLAT_READONLY | NBDSERVE_FLAT_TEMPORARY))
    return -EINVAL;
  if (!file && !u_parse_number(path + 4, INT64_MAX, &o.create)) return -EINVAL;
  if (o.create > INT64_MAX) return -EINVAL;
  struct flat *f = u_zalloc(sizeof *f);
  if (!f) return -ENOMEM;
  os_monitor_init(&f->lock);
  for (int i = 0; i < FLAT_REGIONS; i++)
    os_monitor_init(&f->region[i]);
  f->own.run_batch = flat_batch;
  f->fd = f->overlay_fd = -1;
  int err = flat_open_target(f, file, !o.flags, o.create, &is_new);
  if (!err) err = flat_find_slice(f, o.offset, o.size);
  if (!err && (o.flags & NBDSERVE_FLAT_TEMPORARY))
    err = flat_make_overlay(f, o.dir, SIZE_MAX);
  if (err) {
    if (is_new) os_remove_own_file(path, f->fd);
    flat_close(f);
    return err;
  }
  out->size = f->size;
  out->flags |= NBDSERVE_EXPORT_MULTI_CONN; /* fdatasync is for all writers */
  if (o.flags & NBDSERVE_FLAT_READONLY) out->flags |= NBDSERVE_EXPORT_READONLY;
  if (os_is_rotational(f->fd)) out->flags |= NBDSERVE_EXPORT_ROTATIONAL;
  out->ops = &flat_ops;
  out->ctx = f;
  return 0;
}

#endif /* !NBDSERVE_NO_FLAT */

/* ==== [11] CLIENT (peer_) ================================================
 * A client of another server, as small as one can be that is right: fixed
 * newstyle, GO, simple replies, READs and WRITEs, several under way at a time
 * (proto.md, the same parts as in [8] and [9]).  Section [12] gets blocks from
 * other stores with it.
 *
 * What travels, client to peer (>) and back (<):
 *
 *   handshake     < hello   > flags   > option GO   < replies to it, up to ACK
 *   transmission  > requests                    < their replies, in any order
 *   end           > NBD_CMD_DISC, or in the handshake NBD_OPT_ABORT
 *
 * The messages are drawn in [5].  A struct nbdserve_peer belongs to one call of
 * the library at a time: nothing here is locked.  The state of its connection
 * is in two members:
 *
 *   deadline      size         state
 *   0             0            nothing has been sent
 *   a time        0, or known  in the handshake, which ends at that time
 *   0             known        in the transmission phase
 *
 * (P1) Every wait ends: by the peer, by a time limit, or because `progress`
 *      says so, which is asked several times a second.
 * (P2) What a peer says is not believed: no length of it is allocated, no
 *      number of it is an index that was not tested.
 * (P3) No lock is held while the peer is waited for. */
#if !NBDSERVE_NO_CLIENT && !NBDSERVE_NO_CAS

#ifndef PEER_ALIGN      /* the tests have smaller blocks */
#define PEER_ALIGN 4096 /* requests begin and end at multiples of it */
#endif

enum {
  PEER_MOST = 1 << 20, /* the longest request, bytes */
  PEER_REPLIES = 64,   /* to GO, at most */
  PEER_PENDING = 1,    /* peer_part.err, until the reply has come */
  PEER_LOOK_MS = 200   /* until progress is asked again */
};

/* One READ or WRITE.  Whoever asks for it owns the data; it must stay where it
 * is until peer_transfer returns. */
struct peer_part {
  uint64_t off;
  uint32_t len;
  unsigned char *data;
  int err; /* the answer: 0 or -EIO; or PEER_PENDING */
};

/* Notes what went wrong with a peer, for the one who called the library: there
 * is nobody here to print it.  Returns err. */
static int OS_PRINTF(3, 4)
    peer_fail(struct nbdserve_peer *p, int err, const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(p->why, sizeof p->why, fmt, ap);
  va_end(ap);
  for (char *c = p->why; *c; c++)
    if (*c < ' ' || *c > '~') *c = '?'; /* it may be the peer's text */
  return err;
}

/* Sends (writing) or receives n bytes (P1).  The time limit is that of the
 * handshake or, later, stall_ms for this call.  Nothing is done that may
 * block: a pipe, which knows no MSG_DONTWAIT, is written in pieces that fit
 * where poll says that there is room. */
static int peer_move(struct nbdserve_peer *p, int writing, unsigned char *data,
                     size_t n) {
  int64_t until = p->deadline ? p->deadline : os_now_ms() + p->stall_ms;
  int fd = writing ? p->out_fd : p->in_fd;
  struct pollfd poller = {fd, writing ? POLLOUT : POLLIN, 0};
  while (n > 0) {
    if (p->progress && p->progress(p->arg, p->done, p->total))
      return -ECANCELED;
    if (os_now_ms() >= until)
      return peer_fail(p, -ETIMEDOUT, "the peer says nothing any more");
    if (poll(&poller, 1, PEER_LOOK_MS) <= 0) continue;
    ssize_t some = writing ? send(fd, data, n, MSG_DONTWAIT | MSG_NOSIGNAL)
                           : recv(fd, data, n, MSG_DONTWAIT);
    if (some < 0 && errno == ENOTSOCK)
      some = writing ? write(fd, data, (size_t)u_min(n, PIPE_BUF))
                     : read(fd, data, n);
    if (some == 0) return peer_fail(p, -EPIPE, "the peer has hung up");
    if (some < 0 && errno != EAGAIN && errno != EINTR)
      return peer_fail(p, -errno, "the peer is gone: %s", strerror(errno));
    if (some <= 0) continue;
    data += some;
    n -= (size_t)some;
  }
  return 0;
}

/* Does the handshake, and enters the export of that name.  The option GO asks
 * for one piece of information, the block sizes; the size of the export comes
 * unasked.  Other pieces, and replies that are not known here, are passed over.
 * The buffer holds each message that we send or want to look at, and the NUL
 * behind an error's text.
 *
 * 0 or -errno: -ENOENT if the peer refuses the export, -EPROTO if it speaks
 * another language or the export is not for us. */
static int peer_enter(struct nbdserve_peer *p, const char *name) {
  unsigned char b[WIRE_OPTION_REPLY_LEN + WIRE_STRING_MAX + 32];
  size_t n = strlen(name);
  if (n > WIRE_STRING_MAX) return -ENAMETOOLONG;
  if (!p->stall_ms) p->stall_ms = 120000;
  p->deadline = os_now_ms() + p->stall_ms;
  p->size = p->done = p->total = 0;
  *p->why = 0;
  int err = peer_move(p, OS_READ, b, 18);
  if (err) return err;
  unsigned flags = u_get16(b + 16);
  if (u_get64(b) != NBD_INIT_MAGIC || u_get64(b + 8) != NBD_OPTION_MAGIC ||
      !(flags & NBD_FLAG_FIXED_NEWSTYLE))
    return peer_fail(p, -EPROTO, "that is no NBD server, or an old one");
  u_put32(b, flags & (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES));
  u_put64(b + 4, NBD_OPTION_MAGIC);
  u_put32(b + 12, NBD_OPT_GO);
  u_put32(b + 16, (uint32_t)(4 + n + 4));
  u_put32(b + 20, (uint32_t)n);
  memcpy(b + 24, name, n);
  u_put16(b + 24 + n, 1); /* so many pieces of information */
  u_put16(b + 26 + n, NBD_INFO_BLOCK_SIZE);
  err = peer_move(p, OS_WRITE, b, 28 + n);
  for (int i = 0; i < PEER_REPLIES && !err; i++) {
    err = peer_move(p, OS_READ, b, WIRE_OPTION_REPLY_LEN);
    if (err) break;
    uint32_t type = u_get32(b + 12);
    uint32_t len = u_get32(b + 16);
    if (u_get64(b) != NBD_REP_MAGIC || u_get32(b + 8) != NBD_OPT_GO ||
        len > WIRE_STRING_MAX + 2)
      break;
    err = peer_move(p, OS_READ, b, len);
    if (err) break;
    b[len] = 0;
    if (type == NBD_REP_ACK && p->size) {
      p->deadline = 0; /* from now on each message has stall_ms of its own */
      return 0;
    }
    if (type & NBD_REP_ERR_BIT)
      return peer_fail(p, -ENOENT, "the peer refuses %.90s: %.80s", name, b);
    unsigned info = type == NBD_REP_INFO && len >= 2 ? u_get16(b) : UINT_MAX;
    if (info == NBD_INFO_EXPORT && len == 12) {
      p->size = u_get64(b + 2);
      if (!p->size || p->size > INT64_MAX)
        return peer_fail(p, -EPROTO, "the export has no size that can be");
    }
    if (info == NBD_INFO_BLOCK_SIZE && len == 14 &&
        (u_get32(b + 2) > PEER_ALIGN || u_get32(b + 10) < PEER_MOST))
      return peer_fail(p, -EPROTO, "the peer's block sizes are not for us");
  }
  return err ? err : peer_fail(p, -EPROTO, "the peer haggles out of order");
}

/* Sends a request, which the reply names by the cookie, and what a WRITE is to
 * write. */
static int peer_send(struct nbdserve_peer *p, enum nbd_cmd cmd, size_t cookie,
                     struct peer_part *part) {
  unsigned char b[WIRE_REQUEST_LEN];
  assert(part->off % PEER_ALIGN == 0 && part->len % PEER_ALIGN == 0);
  assert(part->len <= PEER_MOST);
  u_put32(b, NBD_REQUEST_MAGIC);
  u_put32(b + 4, cmd); /* and no flags in front of it */
  u_put64(b + 8, cookie);
  u_put64(b + 16, part->off);
  u_put32(b + 24, part->len);
  part->err = PEER_PENDING;
  int err = peer_move(p, OS_WRITE, b, sizeof b);
  return err || cmd != NBD_CMD_WRITE
             ? err
             : peer_move(p, OS_WRITE, part->data, part->len);
}

/* Does the peer's stream take another request at once?  If poll says that it is
 * writable, these few bytes fit.  If it is not, the peer may be waiting for us
 * to take its replies. */
static int peer_has_room(const struct nbdserve_peer *p) {
  struct pollfd poller = {p->out_fd, POLLOUT, 0};
  return poll(&poller, 1, 0) > 0;
}

/* Sends n requests, as fast as they go, so that a peer far away has enough of
 * them, and takes their replies, in whatever order these come; a WRITE goes
 * alone.  The cookie of a request is its index.  A second reply to a request is
 * refused; data follows only the reply to a READ that succeeded, and goes
 * nowhere but to that request's own place (P2).  A request that the peer
 * refuses has its own part->err; the error that is returned is of the
 * connection, which cannot be used any more. */
static int peer_transfer(struct nbdserve_peer *p, enum nbd_cmd cmd,
                         struct peer_part *parts, size_t n) {
  unsigned char b[WIRE_SIMPLE_REPLY_LEN];
  size_t sent = 0;
  int err = 0;
  assert(n <= 1 || cmd == NBD_CMD_READ);
  for (size_t done = 0; done < n && !err; done++) {
    while (sent < n && !err && (sent == done || peer_has_room(p))) {
      err = peer_send(p, cmd, sent, &parts[sent]);
      sent++;
    }
    if (!err) err = peer_move(p, OS_READ, b, sizeof b);
    if (err) return err;
    uint64_t cookie = u_get64(b + 8);
    if (u_get32(b) != NBD_SIMPLE_REPLY_MAGIC || cookie >= sent ||
        parts[cookie].err != PEER_PENDING)
      return peer_fail(p, -EPROTO, "the peer's replies make no sense");
    struct peer_part *part = &parts[cookie];
    part->err = u_get32(b + 4) ? -EIO : 0;
    if (!part->err && cmd == NBD_CMD_READ)
      err = peer_move(p, OS_READ, part->data, part->len);
  }
  return err;
}

/* The error of a part without which nothing goes on. */
static int peer_error(struct nbdserve_peer *p, const struct peer_part *part) {
  if (!part->err) return 0;
  return peer_fail(p, part->err, "the peer cannot read at %" PRIu64, part->off);
}

/* Tells the peer that we are done: in the handshake with an option, later with
 * a request, and not at all if it has not even greeted us.  If that fails it
 * notices by itself; what went wrong before stays in `why`, since all is done
 * on a copy. */
static void peer_leave(const struct nbdserve_peer *p) {
  struct nbdserve_peer copy = *p;
  struct peer_part none = {.off = 0, .len = 0};
  unsigned char abort[16] = {0};
  u_put64(abort, NBD_OPTION_MAGIC);
  u_put32(abort + 8, NBD_OPT_ABORT);
  if (p->deadline)
    (void)!peer_move(&copy, OS_WRITE, abort, sizeof abort);
  else if (p->size)
    (void)!peer_send(&copy, NBD_CMD_DISC, 0, &none);
}

#endif /* !NBDSERVE_NO_CLIENT && !NBDSERVE_NO_CAS */

/* ==== [12] CAS (cas_) ====================================================
 * A store: volumes and snapshots in one file, every distinct block once.  Its
 * format, and the rules (C1) to (C22) that keep it whole, stand at the end of
 * nbdserve.h; this is how the code goes about it.
 *
 * The life of a block that a client writes (cas_put)
 *
 *   1. It is hashed.  All zeroes: it becomes a hole, and 2 to 4 are left out.
 *   2. It gets a slot: one that the index finds by the digest, or a free one.
 *      From here until 5 a hold on the slot (a count in `refs`) is ours.
 *   3. A slot of the index is read and compared; one that differs is given up
 *      for the next.  A free slot is written: data, then digest.
 *   4. Under the lock: the leaf of the volume's map gets the slot, and with it
 *      our hold, and the entry "block -> slot" is put into the open log page.
 *      The slot that the block had before loses a hold.
 *   5. The open log page is written, not synced, before the lock is let go:
 *      from now on the write survives kill -9, and may be answered.
 *   6. A flush closes the log page and syncs: now it survives a power cut.
 *   7. Later a checkpoint writes the leaf; the log entry is not needed then.
 *
 * The life of a slot
 *
 *                  cas_take_slot, cas_take_pair
 *        FREE  ------------------------------------->  refs > 0
 *    (refs = 0)                                          |
 *         ^                                              | the last hold goes:
 *         |   of data: a sync that covers the log        | cas_drop
 *         |   page which says so (C5)                    v
 *         +----------------------------------------  CAS_PENDING
 *             of a page: a checkpoint without it (C6)    in a list
 *
 * Everything hangs in one tree of nodes.  At the top is the catalog, then come
 * the pages of its records, then the maps of the volumes, then their leaves:
 *
 *   level   page   names
 *   6, 5    CAT1   pages of the catalog
 *   4       CAT1   volumes, by records, with two maps for each
 *   3 to 1  MAP1   pages of a map
 *   0       MAP1   slots of blocks: a leaf
 *
 * A node is `dirty` when it differs from what is stored: its slot is 0 then,
 * and all nodes above it are dirty.  Maps are shared by snapshots and clones; a
 * node that is shared is copied before it changes.  All nodes are in memory,
 * but the slots of leaves that were not used lately are not.
 *
 * Locks: ckpt, then lock.  Once the store is open the file is touched under
 * `lock` only to write the open log page, to give space to a segment, and to
 * clear the digests of one that was given back.  The lock is let go by
 * cas_unlock and cas_wait only, which write that page.  A function that lets it
 * go meanwhile has "(unlocks)" in its comment. */
#if !NBDSERVE_NO_CAS

#ifndef CAS_UNIT          /* the tests make stores with everything in small */
#define CAS_UNIT 1048576u /* bytes: superblocks, log, groups start at these */
#define CAS_FANOUT(block_size) ((block_size) / 4 - 8) /* slots in a map page */
#define CAS_ENTRIES 84                                /* in a log page */
#define CAS_SEGMENT 256u      /* slots; they are taken a segment at a time */
#define CAS_MIN_BLOCK 4096    /* bytes */
#define CAS_RESERVE_PAIRS 128 /* that only what gives them back may take */
#define CAS_MAX_DIRTY 65536   /* nodes; more bring about a checkpoint */
#define CAS_MARGIN 8 /* pairs: a block makes so many nodes dirty, and 1 */
#define CAS_TRIES 4  /* places where a block may be written */
#endif

/* ---- The format ------------------------------------------------------------
 * This part knows no locks and does no I/O.  Numbers are big-endian in the
 * file. */

/* Sizes, in bytes, and where sums and entries are */
enum {
  CAS_PAGE = 4096,      /* of a log page, and of a superblock's place */
  CAS_SUPER_SUM = 480,  /* a superblock's SHA-256 of what stands before */
  CAS_LOG_HEAD = 4032,  /* the head of a log page; before it 84 entries */
  CAS_LOG_SUM = 4064,   /* the sum of a log page: see cas_log_sum */
  CAS_DIGEST_LEN = 32,  /* of a SHA-256 */
  CAS_HEAD = 32,        /* of a head */
  CAS_PAGE_SUM = 20,    /* first 12 bytes of a page's SHA-256, with zeroes
                           here */
  CAS_ENTRY = 48,       /* of an entry of the log */
  CAS_RECORD = 288,     /* of a record of the catalog */
  CAS_NAME = 166,       /* of the longest NAME */
  CAS_PATH = 334,       /* of the longest VOL@NAME, with a NUL */
  CAS_IS_SNAPSHOT = 1,  /* in cas_record.flags */
  CAS_IS_PARTIAL = 2,   /* its contents are still being fetched */
  CAS_HAS_PARTIAL = 1,  /* in cas_super.ro_compat: there is such a volume */
  CAS_VERSION = 2,      /* of the format */
  CAS_MAP = 0x4d415031, /* "MAP1" */
  CAS_CAT = 0x43415431, /* "CAT1" */
  CAS_LOG = 0x4c4f4731, /* "LOG1" */

  /* Limits that follow */
  CAS_SLOTS = CAS_UNIT / 32,     /* slots in a group */
  CAS_GROUPS = CAS_UNIT / 8 - 1, /* groups in a store: < 2^32 slots in all */
  CAS_DIGESTS = CAS_PAGE / CAS_DIGEST_LEN, /* in a sector's 4096 */
  CAS_TWIN = CAS_SEGMENT / 2, /* a page in slot x has its twin in x ^ this */
  CAS_LEVELS = 4,             /* levels of a map; the next has records */
  CAS_TOP = 6                 /* level of the catalog's root */
};

#define CAS_MAGIC "NBDSCAS2"      /* the last one is the version, for people */
#define CAS_PARTIAL "/partial"    /* behind the id in a partial volume's name */
#define CAS_PULL_MAGIC "NBDSPULL" /* of exports for other stores */
#define CAS_BLOCKS_MAGIC "NBDSBLKS"
#define CAS_MAX_SEQ (UINT64_C(1) << 62) /* above the number of any log page */

/* A slot whose contents were lost: reading is an error, writing heals. */
#define CAS_LOST UINT32_MAX
/* In files this number is kept for blocks that are known by their digest only,
 * and never written; cas_block.expected: the map may have any slot. */
#define CAS_ANY (UINT32_MAX - 1)

struct cas_super {
  uint64_t magic; /* the bytes of CAS_MAGIC */
  uint64_t version;
  uint64_t block_size;  /* bytes */
  unsigned char id[16]; /* of the store */
  uint64_t number;      /* of its checkpoint, or raised since: see (C8) */
  uint64_t replay;      /* log page to replay from */
  uint64_t log_pages;
  uint64_t nslots;    /* slots in use */
  uint64_t catalog;   /* slot of the catalog's root, or 0 */
  uint64_t next_id;   /* id of the next volume or snapshot */
  uint64_t incompat;  /* a bit that is not known: do not open */
  uint64_t ro_compat; /* a bit that is not known: do not write */
};
struct cas_log_head {
  uint64_t magic;   /* CAS_LOG */
  uint64_t count;   /* entries */
  uint64_t seq;     /* its number; it lies at that mod log_pages */
  uint64_t durable; /* all log pages before that one are durable */
  uint64_t super;   /* number of the newest superblock that is durable twice */
};
struct cas_entry {
  uint64_t volume; /* id */
  uint64_t slot;   /* 0: holes */
  uint64_t block;  /* number of the block, or of the first */
  unsigned char digest[CAS_DIGEST_LEN]; /* of the slot's data; or, of holes,
                                           number of blocks, 8 bytes */
};
struct cas_head {
  uint64_t magic;  /* CAS_MAP or CAS_CAT */
  uint64_t level;  /* 0: a leaf */
  uint64_t index;  /* in its level, mod 2^32 */
  uint64_t number; /* of its checkpoint */
};
struct cas_record {
  uint64_t id;        /* of the volume or snapshot; 0: no record */
  uint64_t flags;     /* CAS_IS_... */
  uint64_t size;      /* bytes */
  uint64_t root;      /* slot of the root of its map */
  uint64_t levels;    /* CAS_LEVELS */
  uint64_t created;   /* seconds since 1970 */
  uint64_t made_from; /* id; of a snapshot: its volume */
  uint64_t digests;   /* slot of the root of the map with its id's tree, or 0 */
  unsigned char cid[CAS_DIGEST_LEN]; /* content id, or zeroes */
  unsigned char kept[40];            /* zeroes: 32 for the origin of a lazy
                                        clone, 8 for a quota */
  char name[CAS_NAME + 1];           /* without that of its volume */
};

/* How many bytes the members of these have in the file, where they lie one
 * behind the other; to 0.  Of 4 or 8 bytes: a number, which is a uint64_t in
 * the structure; of others: bytes. */
static const unsigned char cas_super_sizes[] = {8, 4, 4, 16, 8, 8, 4,
                                                4, 4, 4, 4,  4, 0};
static const unsigned char cas_log_sizes[] = {4, 4, 8, 8, 8, 0};
static const unsigned char cas_entry_sizes[] = {4, 4, 8, CAS_DIGEST_LEN, 0};
static const unsigned char cas_head_sizes[] = {4, 4, 4, 8, 0};
static const unsigned char cas_record_sizes[] = {
    4, 4, 8, 4, 4, 8, 4, 4, CAS_DIGEST_LEN, 40, CAS_NAME, 0};

/* The members have no space between them in memory, either. */
STATIC_ASSERT(super_is_dense, sizeof(struct cas_super) == 16 + 11 * 8);
STATIC_ASSERT(log_is_dense, sizeof(struct cas_log_head) == 5 * 8);
STATIC_ASSERT(entry_is_dense, sizeof(struct cas_entry) == 3 * 8 + 32);
STATIC_ASSERT(head_is_dense, sizeof(struct cas_head) == 4 * 8);
STATIC_ASSERT(record_is_dense, offsetof(struct cas_record, name) == 8 * 8 + 72);
STATIC_ASSERT(super_fits, CAS_SUPER_SUM + CAS_DIGEST_LEN == 512);
STATIC_ASSERT(log_fits, CAS_LOG_SUM + CAS_DIGEST_LEN == CAS_PAGE);
STATIC_ASSERT(log_head_fits, CAS_LOG_HEAD + CAS_HEAD == CAS_LOG_SUM);
STATIC_ASSERT(entries_fit, 84 * CAS_ENTRY == CAS_LOG_HEAD);
STATIC_ASSERT(record_fits, 112 + CAS_NAME <= CAS_RECORD);

/* Encodes a structure to p. */
static void cas_encode(const unsigned char *size, const void *from,
                       unsigned char *p) {
  const unsigned char *member = from;
  for (; *size; p += *size++) {
    uint64_t number;
    memcpy(&number, member, sizeof number);
    if (*size == 4) u_put32(p, (uint32_t)number);
    if (*size == 8) u_put64(p, number);
    if (*size > 8) memcpy(p, member, *size);
    member += *size > 8 ? *size : sizeof number;
  }
}

/* Decodes a structure from p. */
static void cas_decode(const unsigned char *size, const unsigned char *p,
                       void *to) {
  unsigned char *member = to;
  for (; *size; p += *size++) {
    uint64_t number = *size == 4 ? u_get32(p) : u_get64(p);
    size_t n = *size > 8 ? *size : sizeof number;
    memcpy(member, *size > 8 ? p : (const void *)&number, n);
    member += n;
  }
}

/* Computes the SHA-256 of a page with zeroes in the place of its own sum.  A
 * part of it stands there, all of it in the digest area.  Returns whether that
 * part is there, and puts it there. */
static int cas_sum_page(int hw, unsigned char *p, size_t len,
                        unsigned char sum[CAS_DIGEST_LEN]) {
  unsigned char was[CAS_HEAD - CAS_PAGE_SUM];
  memcpy(was, p + CAS_PAGE_SUM, sizeof was);
  memset(p + CAS_PAGE_SUM, 0, sizeof was);
  sha_256(hw, p, NULL, len, sum, NULL);
  memcpy(p + CAS_PAGE_SUM, sum, sizeof was);
  return memcmp(was, sum, sizeof was) == 0;
}

/* ---- What is in memory --------------------------------------------------- */

/* How much is done at a time, and what is kept free */
enum {
  CAS_FILL = 128,     /* digests read in one call to fill the index */
  CAS_BATCH = 256,    /* blocks that go through a request's steps together, and
                         pieces in one call of os_transfer */
  CAS_PORTION = 64,   /* pages that a checkpoint copies under one lock, leaves
                         that eviction looks at, places that a log tries */
  CAS_CANDIDATES = 2, /* slots of the index that a block is compared with */
  CAS_LOOK = 4096,    /* segments that are looked at before one is made do;
                         slots that are freed under one lock */
  CAS_FOR_RM = 6,     /* pairs that only removing may take */
  CAS_IDLE_MS = 1000, /* without work until the log says what is durable */
  CAS_MAX_LOST = 8,   /* pages; with more of them lost a store is not written */
  CAS_WAITING = 262144, /* pending slots that bring on a checkpoint */
  CAS_WANTED = CAS_BATCH * CAS_DIGEST_LEN, /* bytes of digests in /blocks */
  CAS_FOUND = CAS_PAGE + CAS_WANTED,       /* there its blocks begin */
  CAS_LEAVES = 32,                         /* that are pulled together, */
  CAS_BLOCKS = 4096,            /* and blocks, of the smallest size */
  CAS_WEEK = 604800,            /* seconds that a partial volume is kept */
  CAS_SLACK = 64 * CAS_SEGMENT, /* free slots to have before filling gaps */
  CAS_CACHE_MIB = 64            /* memory for leaves, by default */
};

/* cas_group.refs of a slot that nothing in memory names, but something durable
 * may: it becomes free when the list that it is in does */
#define CAS_PENDING (-1)

/* cas_group.tag: what the slot holds */
enum {
  TAG_NONE = 0,            /* nothing, or data that is not in the index */
  TAG_PAGE = 1,            /* a page: never in the index (C11) */
  TAG_RETIRED = 2,         /* what was a page, until the slot is free */
  TAG_INDEXED = 0x40000000 /* data; the other bits are of its digest */
};
#define CAS_TAG(digest) (u_get32(digest) >> 2 | (uint32_t)TAG_INDEXED)
#define CAS_GOOD 0x80000000u /* read or written since, and it fitted */

/* cas_segment.space: does the file have the space for all of a segment, so that
 * a free pair in it counts (C18)?  A sync makes WRITTEN SYNCING when it begins
 * and DURABLE when it ends. */
enum cas_space {
  SPACE_UNKNOWN,
  SPACE_WRITTEN, /* yes, but after a power cut maybe not */
  SPACE_SYNCING, /* the sync that is running changes that */
  SPACE_DURABLE,
  SPACE_BUSY,  /* it is being given back: nothing is taken from it */
  SPACE_FULL,  /* a write found none: nothing is taken from it (C19) until
                  something is freed */
  SPACE_BROKEN /* a write failed: nothing is taken until the store is opened
                  anew */
};

/* 256 slots */
struct cas_segment {
  uint16_t nfree;      /* free slots */
  uint16_t npairs;     /* pairs of slots, x and x ^ CAS_TWIN, that are free */
  uint16_t npages;     /* slots that hold pages */
  unsigned char space; /* enum cas_space */
  unsigned char is_given; /* digests say that it was given back, and it was
                             got again */
};

/* What memory holds of each slot of a group; in arrays, because searches go
 * along one of these only. */
struct cas_group {
  int32_t refs[CAS_SLOTS];    /* holds: edges and pins; 0: free; CAS_PENDING */
  uint32_t tag[CAS_SLOTS];    /* TAG_..., CAS_TAG; CAS_GOOD */
  uint32_t link[CAS_SLOTS];   /* next slot of its bucket or list; 0: none */
  uint32_t bucket[CAS_SLOTS]; /* its first slot; by number of the bucket */
  struct cas_segment segment[CAS_SLOTS / CAS_SEGMENT];
};

/* A node of the tree */
struct cas_node {
  int32_t refs;           /* edges from nodes (C13) */
  uint32_t slot;          /* of its page; 0: it is dirty; CAS_LOST */
  uint32_t index;         /* in its level */
  uint32_t at;            /* leaf in memory: where st->leaves has it */
  uint32_t nkids;         /* kids that there is room for */
  unsigned char level;    /* 0: a leaf */
  unsigned char is_used;  /* leaf: since eviction came by */
  unsigned char is_given; /* leaf: a checkpoint that is being written has its
                             slot, but maybe not its contents yet */
  uint32_t *slots;        /* leaf: [fanout]; NULL: not in memory */
  struct cas_node **kid;  /* else: [nkids]; NULL: zeroes, or no volume */
};

/* A volume or snapshot.  All its exports are this one struct.  It has two
 * records.  Where a record's id is 0 there is no such volume, not yet or no
 * more, for who goes by that record.  Its roots are set only when it is
 * encoded. */
struct cas_volume {
  struct ex_batched own;     /* must come first */
  struct nbdserve_cas *st;   /* the store that it is in */
  struct cas_volume *parent; /* the volume of a snapshot, else NULL */
  struct cas_node *page;     /* of level 4, with its record and maps */
  uint32_t place;            /* of its record in the catalog */
  uint32_t id;               /* unlike all others; in the order of coming */
  uint64_t clients;          /* exports, contexts and calls that use it.  If
                                now.id is 0 and there is one, it is being
                                filled: hidden, with its name reserved */
  uint64_t pins;             /* readers that are done in a moment */
  struct cas_record now;     /* what everybody sees */
  struct cas_record then; /* the same, unless this is set: what a checkpoint */
  int is_staged;          /* that is being made or written says */
  int is_tree;            /* a view of the map with the tree of its id */
  struct cas_node **edge; /* staged: to its map, or to the tree of its id: it */
  struct cas_node *was;   /* was changed, and led here; else both are NULL */
};

struct nbdserve_cas {
  /* ---- Fixed while the store is open: no lock is needed. */
  int fd;              /* the file or block device, ours to close */
  int readonly;        /* nothing is changed */
  int verify;          /* a block is checked when it is first read */
  int hw;              /* the processor computes SHA-256 */
  int is_device;       /* it cannot grow, and has all its space */
  int can_read_now;    /* OS_READ_NOW works with the file */
  int repair;          /* goes on behind a damaged part of the log */
  int accept_loss;     /* pages that cannot be read are given up */
  uint32_t bs;         /* bytes of a block */
  uint32_t fanout;     /* slots that a map page names */
  uint32_t per_page;   /* records in a page of the catalog */
  uint64_t cache;      /* bytes for leaves; beyond it clean ones are evicted */
  uint64_t data_off;   /* byte of the file where the groups begin */
  uint64_t end;        /* bytes of the file when it was opened */
  uint64_t max_blocks; /* blocks that a volume may have */

  /* ---- Guarded by ckpt: one checkpoint at a time. */
  struct os_monitor ckpt;
  struct cas_super super; /* of the last checkpoint, durable; id, log_pages:
                             fixed.  It changes under both locks, so one is
                             enough to read it. */
  uint64_t last_number;   /* of a checkpoint that was begun, or (C8) */

  /* ---- Guarded by lock, as is all that follows; woken: a sync, a checkpoint
   * or other work has ended. */
  struct os_monitor lock;
  int syncing;       /* a sync is under way; a second one may miss its error */
  uint64_t nsyncs;   /* syncs that have begun */
  uint64_t nsynced;  /* the last of them that has ended */
  int failed;        /* -errno: nothing is written any more (C14) */
  int is_outdated;   /* the log follows a superblock that is gone */
  int is_short;      /* the file does not have all slots of the superblock */
  int log_damaged;   /* a durable page of the log is not there (C9) */
  int catalog_lost;  /* a part of the catalog or of a map is not there (C21) */
  int log_unread;    /* a page of the log cannot be read: who knows what it is
                       when it can be */
  int log_unwritten; /* a page of it cannot be written again */
  int is_replaying;  /* what is in the log need not be logged */
  int is_open;       /* recovery is over */
  int is_ending;     /* the store is freed: nothing is read or dropped */
  struct cas_loader *loader; /* while it is opened */
  int gives_back;            /* a gc is under way: one at a time */
  int64_t yielded_ms;        /* when cas_yield last slept */
  int busy;                  /* a thread is in cas_work, */
  int closing;               /* which is to end, */
  int is_borrowed;           /* and is one that wants to go on with a request:
                                only who has set busy writes this then */

  struct cas_node *catalog;    /* the root of all */
  struct cas_volume **volumes; /* [nvolumes]: all of them, also what is
                                   hidden, in the order of their ids */
  uint32_t nvolumes;
  uint32_t volume_room;         /* that volumes has */
  struct cas_volume **by_place; /* [places]: by cas_volume.place */
  uint32_t places;              /* that there is room for */
  uint32_t next_id;             /* id of the next volume or snapshot */

  struct cas_group *groups[CAS_GROUPS]; /* the first ngroups are there */
  uint32_t ngroups;                     /* groups in memory */
  uint32_t nslots;                      /* slots in the file */
  uint32_t nfree;                       /* free slots that may be taken: loose
                                           are those of no pair that counts */
  uint32_t npairs;                      /* free pairs that count */
  uint32_t npending;                    /* free pairs that wait for a sync */
  uint32_t mask;                        /* of buckets: see cas_bucket */
  uint32_t data_cursor;                 /* where to look for a free slot */
  uint32_t pair_cursor;                 /* segment of the last pair */
  uint32_t back_cursor; /* before it: space is there, or there is none */
  uint32_t ndirty;      /* dirty nodes */
  uint32_t dropped;     /* list of pending slots: free after a sync (C5) */
  uint32_t retired;     /* the same: free after a checkpoint (C6) */
  uint32_t nwaiting;    /* slots in both lists */
  uint32_t filled;      /* slots that the index was filled with */
  uint32_t to_fill;     /* slots that it is to be filled with */

  struct cas_node **leaves; /* [nleaves]: those that are in memory */
  uint32_t nleaves;
  uint32_t leaf_room; /* that leaves has */
  uint32_t hand;      /* eviction goes on from there */

  unsigned char page[CAS_PAGE];       /* the log page that is being filled */
  uint32_t nlog;                      /* entries in it */
  uint32_t nwritten;                  /* of them are in the file, too */
  uint32_t mixed[2][SHA_STATE_WORDS]; /* nwritten of them: see cas_log_sum */
  uint64_t seq;                       /* number of that page */
  uint64_t durable; /* pages before that number are durable (C4) */
  uint64_t marked;  /* what the log says about that (C22) */
};

#define CAS_AT(st, slot, field) \
  ((st)->groups[(slot) / CAS_SLOTS]->field[(slot) % CAS_SLOTS])

/* The segment of a slot. */
static struct cas_segment *cas_segment(struct nbdserve_cas *st, uint32_t slot) {
  return &st->groups[slot / CAS_SLOTS]->segment[slot % CAS_SLOTS / CAS_SEGMENT];
}

/* How many blocks that many bytes take; the last one may be a part. */
static uint64_t cas_blocks(const struct nbdserve_cas *st, uint64_t size) {
  return size / st->bs + (size % st->bs != 0);
}

/* May a volume have that many bytes? */
static int cas_is_size(const struct nbdserve_cas *st, uint64_t size) {
  return size <= INT64_MAX && cas_blocks(st, size) <= st->max_blocks;
}

/* Where the digest of a slot lies in the file. */
static uint64_t cas_digest_off(const struct nbdserve_cas *st, uint32_t slot) {
  uint64_t group = CAS_UNIT + (uint64_t)CAS_SLOTS * st->bs;
  assert(st->data_off && slot / CAS_SLOTS < CAS_GROUPS);
  return st->data_off + slot / CAS_SLOTS * group +
         (uint64_t)(slot % CAS_SLOTS) * CAS_DIGEST_LEN;
}

/* Where a slot lies in the file. */
static uint64_t cas_data_off(const struct nbdserve_cas *st, uint32_t slot) {
  uint32_t in = slot % CAS_SLOTS;
  return cas_digest_off(st, slot - in) + CAS_UNIT + (uint64_t)in * st->bs;
}

/* Where a log page lies in the file. */
static uint64_t cas_log_off(const struct nbdserve_cas *st, uint64_t seq) {
  assert(st->super.log_pages >= 8);
  return 2 * CAS_UNIT + seq % st->super.log_pages * CAS_PAGE;
}

/* Reads or writes at an offset in the file. */
static int cas_io(struct nbdserve_cas *st, int writing, void *buf, size_t len,
                  uint64_t off) {
  assert(buf && len && !(writing == OS_WRITE && st->readonly));
  struct iovec v = {buf, len};
  return os_transfer(st->fd, writing, &v, 1, off);
}

/* Makes room for item `at` in an array of pointers, of which `array` is the
 * address, maybe elsewhere in memory; what is new is NULL.  After an error it
 * is as it was. */
static int cas_enlarge(void *array, uint32_t *room, uint32_t at) {
  uint32_t want = *room ? *room : 4;
  void *old;
  memcpy(&old, array, sizeof old);
  assert(!old == !*room);
  if (at < *room) return 0;
  while (want <= at)
    want *= 2;
  void *larger = u_zalloc(want * sizeof(void *));
  if (!larger) return -ENOMEM;
  if (old) memcpy(larger, old, *room * sizeof(void *));
  NBDSERVE_FREE(old);
  memcpy(array, &larger, sizeof larger);
  *room = want;
  return 0;
}

/* ---- The log ----------------------------------------------------------------
 * Maps change in memory, and reach the file with the next checkpoint.  Until
 * then the log says what has changed: "block B of volume V is now in slot S",
 * or "these blocks are zeroes".  Replayed over the last checkpoint, in order,
 * it gives the maps of the moment at which it ends.
 *
 *   ... [closed] [closed] [closed] [open page] [stale] [stale] ...
 *       ^ super.replay    ^ st->durable        numbers of an earlier round
 *
 * The log is a ring of pages, each with a number that fits its place once in a
 * round.  So a page that a cut has torn, or an old one, is told from the next
 * one by its number and its sum, and no pointer to the end is needed.  Only the
 * open page is written more than once, each time with more entries; a sync
 * closes it, so what is durable is never written over (C13). */

/* Nothing is written any more (C14). */
static void cas_fail(struct nbdserve_cas *st, int err) {
  if (!err) return;
  st->failed = -EIO;
  os_wake_all(&st->lock);
}

/* Computes the sum of a log page with so many entries: the SHA-256 of these,
 * with zeroes up to a multiple of 64 bytes, of its head, and of the store's id.
 * mixed: the state after the whole blocks of 64 bytes which the first `had`
 * entries fill, and then after those which all of them fill: later entries do
 * not change these, so an entry costs two blocks of SHA-256 and not all of its
 * page.  With `had` 0 it need not be set. */
static void cas_log_sum(const struct nbdserve_cas *st, const unsigned char *p,
                        uint32_t had, uint32_t count,
                        uint32_t mixed[2][SHA_STATE_WORDS],
                        unsigned char sum[CAS_DIGEST_LEN]) {
  uint32_t from = had * CAS_ENTRY / SHA_BLOCK_LEN;
  uint32_t whole = count * CAS_ENTRY / SHA_BLOCK_LEN;
  uint32_t rest = count * CAS_ENTRY % SHA_BLOCK_LEN;
  uint32_t pad = rest ? SHA_BLOCK_LEN : 0; /* bytes of the last block, if any */
  unsigned char tail[SHA_BLOCK_LEN + CAS_HEAD + sizeof st->super.id] = {0};
  uint32_t state[2][SHA_STATE_WORDS];
  assert(had <= count && count <= CAS_ENTRIES);
  if (!had) sha_begin(mixed);
  sha_mix(st->hw, mixed, p + from * SHA_BLOCK_LEN, NULL, whole - from);
  memcpy(state, mixed, sizeof state);
  memcpy(tail, p + whole * SHA_BLOCK_LEN, rest);
  memcpy(tail + pad, p + CAS_LOG_HEAD, CAS_HEAD);
  memcpy(tail + pad + CAS_HEAD, st->super.id, sizeof st->super.id);
  sha_mix(st->hw, state, tail, NULL, pad / SHA_BLOCK_LEN);
  sha_end(st->hw, state, tail + pad, NULL,
          whole * SHA_BLOCK_LEN + pad + CAS_HEAD + sizeof st->super.id, sum,
          NULL);
}

/* Writes the log page that is being filled, at its place.  A torn write loses
 * nothing that was there before, because the entries come first and the sum
 * last (C12).  st->failed tells whether it failed. */
static void cas_log_write(struct nbdserve_cas *st) {
  struct cas_log_head head = {CAS_LOG, st->nlog, st->seq, st->durable,
                              st->super.number};
  unsigned char *p = st->page;
  if (st->failed) return;
  assert(!st->readonly && st->nwritten <= st->nlog &&
         st->nlog < CAS_ENTRIES + 1);
  assert(st->durable <= st->seq && st->marked <= st->durable);
  assert(st->seq - st->super.replay < st->super.log_pages);
  cas_encode(cas_log_sizes, &head, p + CAS_LOG_HEAD);
  cas_log_sum(st, p, st->nwritten, st->nlog, st->mixed, p + CAS_LOG_SUM);
  cas_fail(st, cas_io(st, OS_WRITE, p, CAS_PAGE, cas_log_off(st, st->seq)));
  st->nwritten = st->nlog;
  st->marked = st->durable;
}

/* Lets the lock go.  What was logged is out of the process first, so nobody can
 * be answered because of it before (C3).  Returns st->failed: 0, or -errno if
 * what was logged may not be in the file. */
static int cas_unlock(struct nbdserve_cas *st) {
  if (st->nwritten < st->nlog) cas_log_write(st);
  int err = st->failed;
  os_unlock(&st->lock);
  return err;
}

/* Lets others have the lock for a moment, whenever the clock shows another
 * millisecond.  To unlock it alone would help nobody: we would have it again
 * before a waiter wakes up.  So we sleep, too.  (unlocks) */
static void cas_yield(struct nbdserve_cas *st) {
  const struct timespec moment = {0, 1};
  if (NBDSERVE_NO_THREADS || st->is_ending || os_now_ms() == st->yielded_ms)
    return;
  cas_unlock(st);
  nanosleep(&moment, NULL);
  os_lock(&st->lock);
  st->yielded_ms = os_now_ms();
}

/* Waits to be woken, as os_wait. */
static void cas_wait(struct nbdserve_cas *st) {
  if (st->nwritten < st->nlog) cas_log_write(st);
  os_wait(&st->lock);
}

/* Begins the next log page, if anything is in this one.  Closed pages are never
 * written again. */
static void cas_log_close(struct nbdserve_cas *st) {
  if (!st->nlog) return;
  if (st->nwritten < st->nlog) cas_log_write(st);
  assert(st->failed || st->nwritten == st->nlog);
  memset(st->page, 0, CAS_PAGE);
  st->nlog = st->nwritten = 0;
  st->seq++;
}

/* Logs that a block of a volume is now in a slot, whose data has that digest;
 * or, with slot 0, that n of them from it on are zeroes.  What is hidden is not
 * logged: after a crash it is not there. */
static void cas_log(const struct cas_volume *vol, uint64_t block, uint64_t n,
                    uint32_t slot, const unsigned char *digest) {
  struct nbdserve_cas *st = vol->st;
  struct cas_entry entry = {.volume = vol->id, .slot = slot, .block = block};
  if (st->is_replaying || (!vol->now.id && !vol->is_staged)) return;
  assert(slot != CAS_LOST && st->nlog < CAS_ENTRIES && (digest || !slot));
  u_put64(entry.digest, n);
  if (slot) memcpy(entry.digest, digest, CAS_DIGEST_LEN);
  cas_encode(cas_entry_sizes, &entry, st->page + st->nlog * CAS_ENTRY);
  if (++st->nlog == CAS_ENTRIES) cas_log_close(st);
}

/* ---- Slots ------------------------------------------------------------------
 * Who holds a slot, and where free ones come from.  `refs` counts edges: leaves
 * in memory or on the medium that name the slot, and pins of calls that are
 * reading or writing it.  A block that the index finds gets one more edge, and
 * its data is there once.  Of the pair of a page the first slot has the holds;
 * its twin has one, for as long as the first has any.
 *
 * Slots are found a segment at a time, as what is written together should lie
 * together.  A segment has nfree slots, of which some form pairs: x and its
 * twin.  Pages need pairs, and a checkpoint must not fail for lack of them, so
 * a pair counts (npairs) only in a segment of which the space in the file is
 * known to survive a power cut.  What is not part of such a pair is loose, and
 * that is what data gets when pairs are short (C18, C20).
 *
 * The life of a segment's space:
 *
 *   UNKNOWN -- cas_give_space --> WRITTEN -- a sync --> SYNCING --> DURABLE
 *      ^                                                               |
 *      +----- BUSY <---- gc notes in the digests that it goes, syncs, -+
 *                        and punches holes
 *
 *   FULL: a write found no space; UNKNOWN again when something becomes free.
 *   BROKEN: a write failed for another reason; until the store is opened. */

/* The bucket of a tag.  There are as many as slots in all groups: their number
 * is above mask and at most twice that, so a new group splits just some (linear
 * hashing). */
static uint32_t *cas_bucket(struct nbdserve_cas *st, uint32_t tag) {
  uint32_t b = tag & ~CAS_GOOD & (2 * st->mask + 1);
  if (b >= st->ngroups * CAS_SLOTS) b &= st->mask;
  assert(b < st->ngroups * CAS_SLOTS);
  return &CAS_AT(st, b, bucket);
}

/* Enters a slot into the index of digests, under its tag. */
static void cas_index(struct nbdserve_cas *st, uint32_t slot, uint32_t tag) {
  uint32_t *bucket = cas_bucket(st, tag);
  assert(CAS_AT(st, slot, refs) > 0);
  assert(slot && tag & TAG_INDEXED);
  CAS_AT(st, slot, tag) |= tag;
  CAS_AT(st, slot, link) = *bucket;
  *bucket = slot;
}

/* Takes a slot out of the index, if it is there, and clears its tag. */
static void cas_unindex(struct nbdserve_cas *st, uint32_t slot) {
  uint32_t *tag = &CAS_AT(st, slot, tag);
  uint32_t *p = cas_bucket(st, *tag);
  while (*tag & TAG_INDEXED && *p && *p != slot)
    p = &CAS_AT(st, *p, link);
  assert(!(*tag & TAG_INDEXED) || *p == slot);
  if (*tag & TAG_INDEXED && *p) *p = CAS_AT(st, slot, link);
  *tag = TAG_NONE;
}

/* The skip-th slot, from 0 on, whose tag fits a digest, which the caller has to
 * compare; 0: there is none.  What can take no more holds does not count. */
static uint32_t cas_lookup(struct nbdserve_cas *st, const unsigned char *digest,
                           int skip) {
  uint32_t tag = CAS_TAG(digest);
  uint32_t slot = *cas_bucket(st, tag);
  while (slot && ((CAS_AT(st, slot, tag) & ~CAS_GOOD) != tag ||
                  CAS_AT(st, slot, refs) >= INT32_MAX / 2 || skip-- > 0))
    slot = CAS_AT(st, slot, link);
  return slot;
}

/* Splits buckets until there is one for each slot of the groups. */
static void cas_split_buckets(struct nbdserve_cas *st, uint32_t from) {
  for (uint32_t b = from ? from : 1; b < st->ngroups * CAS_SLOTS; b++) {
    if (b > 2 * st->mask + 1) st->mask = 2 * st->mask + 1;
    uint32_t *p = &CAS_AT(st, b - st->mask - 1, bucket);
    uint32_t slot = *p;
    *p = 0;
    for (uint32_t next; slot; slot = next) {
      next = CAS_AT(st, slot, link);
      cas_index(st, slot, CAS_AT(st, slot, tag));
    }
  }
}

/* Adds what is free in a segment to the totals (1), or takes it off (-1). */
static void cas_count(struct nbdserve_cas *st, const struct cas_segment *seg,
                      int sign) {
  uint32_t times = (uint32_t)sign; /* unsigned: it wraps, and wraps back */
  if (seg->space > SPACE_DURABLE) return;
  st->nfree += times * seg->nfree;
  if (seg->space == SPACE_DURABLE)
    st->npairs += times * seg->npairs;
  else if (seg->space != SPACE_UNKNOWN)
    st->npending += times * seg->npairs;
}

/* Sets what is known of the space of a slot's segment, and counts so many more
 * slots and pairs in it as free; fewer, if that is below 0. */
static void cas_adjust(struct nbdserve_cas *st, uint32_t slot,
                       enum cas_space space, int nslots, int npairs) {
  struct cas_segment *seg = cas_segment(st, slot);
  cas_count(st, seg, -1);
  seg->space = (unsigned char)space;
  seg->nfree = (uint16_t)(seg->nfree + nslots);
  seg->npairs = (uint16_t)(seg->npairs + npairs);
  cas_count(st, seg, 1);
  assert(seg->nfree <= CAS_SEGMENT && 2 * seg->npairs <= seg->nfree);
}

/* Counts a slot, whose refs are 0, as free (1) or as taken (-1). */
static void cas_set_free(struct nbdserve_cas *st, uint32_t slot, int by) {
  int npairs = CAS_AT(st, slot ^ CAS_TWIN, refs) == 0 ? by : 0;
  assert(CAS_AT(st, slot, refs) == 0);
  cas_adjust(st, slot, cas_segment(st, slot)->space, by, npairs);
}

/* Changes what is known of the space of all segments of which `from` is.  Those
 * of which nothing is known then are looked at again by cas_want_pairs. */
static void cas_change_space(struct nbdserve_cas *st, enum cas_space from,
                             enum cas_space to) {
  if (to == SPACE_UNKNOWN) st->back_cursor = 0;
  for (uint32_t slot = 0; slot < st->nslots; slot += CAS_SEGMENT)
    if (cas_segment(st, slot)->space == from) cas_adjust(st, slot, to, 0, 0);
}

/* Counts segments in until there is a slot, which may be in the file. */
static int cas_extend(struct nbdserve_cas *st, uint32_t slot) {
  for (; st->nslots <= slot; st->nslots += CAS_SEGMENT) {
    if (st->nslots == st->ngroups * CAS_SLOTS) {
      assert(st->ngroups < CAS_GROUPS);
      st->groups[st->ngroups] = u_zalloc(sizeof(struct cas_group));
      if (!st->groups[st->ngroups]) return -ENOMEM;
      st->ngroups++;
      cas_split_buckets(st, st->nslots);
    }
    cas_adjust(st, st->nslots, SPACE_UNKNOWN, CAS_SEGMENT, CAS_TWIN);
    if (st->nslots > 0) continue;
    cas_set_free(st, 0, -1);
    CAS_AT(st, 0, refs) = 1; /* that number means zeroes */
  }
  return 0;
}

/* Does the file have room for a slot? */
static int cas_is_in_file(const struct nbdserve_cas *st, uint64_t slot) {
  if (slot >= (uint64_t)CAS_GROUPS * CAS_SLOTS) return 0;
  uint64_t off = cas_data_off(st, (uint32_t)slot);
  return off < st->end && st->bs <= st->end - off;
}

/* The digest of a free slot that was given back to the file system */
static const unsigned char cas_given[CAS_DIGEST_LEN] = {
    255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
    255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
    255, 255, 255, 255, 255, 255, 255, 255, 255, 255};

/* Reads the digests of a segment and counts its slots that gc has given back to
 * the file system.  Their digests say so: all ones.  A slot that was taken
 * again but is not written yet counts, too.  If they cannot be read all
 * count. */
static int cas_given_back(struct nbdserve_cas *st, uint32_t first) {
  unsigned char digest[CAS_SEGMENT][CAS_DIGEST_LEN];
  int n = 0;
  if (cas_io(st, OS_READ, digest, sizeof digest, cas_digest_off(st, first)))
    return CAS_SEGMENT;
  for (uint32_t i = 0; i < CAS_SEGMENT; i++)
    n += memcmp(digest[i], cas_given, CAS_DIGEST_LEN) == 0;
  return n;
}

/* After a sync: the space of segments that it covers is durable.  Those that
 * were given back before are like any others then: but their digests say so
 * from the next sync on only, and until then pairs in them do not count. */
static void cas_space_is_durable(struct nbdserve_cas *st) {
  unsigned char zeroes[CAS_DIGEST_LEN] = {0};
  for (uint32_t first = 0; first < st->nslots; first += CAS_SEGMENT) {
    struct cas_segment *seg = cas_segment(st, first);
    enum cas_space space = seg->is_given ? SPACE_WRITTEN : SPACE_DURABLE;
    if (seg->space != SPACE_SYNCING && seg->space != SPACE_DURABLE) continue;
    for (uint32_t x = first; seg->is_given && x < first + CAS_SEGMENT; x++)
      if (!CAS_AT(st, x, refs))
        (void)!cas_io(st, OS_WRITE, zeroes, sizeof zeroes,
                      cas_digest_off(st, x));
    seg->is_given = 0;
    if (seg->space == SPACE_SYNCING) cas_adjust(st, first, space, 0, 0);
  }
}

/* Gives a segment its space in the file (C18), maybe behind the file's end.
 * The first segment of a group brings the digests of the group along, the very
 * first one all that stands before it.  The space counts from the next sync on,
 * but at once while the store is opened: what recovery needs was durable
 * before. */
static int cas_give_space(struct nbdserve_cas *st, uint32_t first) {
  int is_new = first == st->nslots;
  int is_durable = !st->is_open || st->is_device;
  int err = 0;
  assert(!st->readonly && first % CAS_SEGMENT == 0 && first <= st->nslots);
  if (first / CAS_SLOTS == CAS_GROUPS) return -ENOSPC; /* all are there */
  uint64_t off = cas_data_off(st, first);
  uint64_t end = off + (uint64_t)CAS_SEGMENT * st->bs;
  if (st->is_device && end > st->end) return -ENOSPC;
  if (first % CAS_SLOTS == 0) off = cas_digest_off(st, first);
  if (first == 0) off = 0;
  if (!st->is_device) err = os_fallocate(st->fd, OS_ALLOCATE, off, end - off);
  int was_given = !is_new && cas_given_back(st, first) > 0;
  /* Where the file system cannot allocate space zeroes are written: to all of
   * what is new, or to slots that are free.  A full one may refuse even what is
   * there.  It may be there only if it was at the last checkpoint and nothing
   * was given back since.  Digests alone prove nothing: a power cut may have
   * kept one, and not its space. */
  if (err == -EOPNOTSUPP ||
      (err == -ENOSPC && !was_given && first < st->super.nslots)) {
    unsigned char *zeroes = u_zalloc(st->bs);
    err = zeroes ? 0 : -ENOMEM;
    if (!is_new) off = cas_data_off(st, first);
    for (uint32_t slot = first; off < end && !err; off += st->bs, slot++)
      if (is_new || !CAS_AT(st, slot, refs))
        err = cas_io(st, OS_WRITE, zeroes, st->bs, off);
    NBDSERVE_FREE(zeroes);
  }
  if (!err) err = cas_extend(st, first);
  if (err) return err;
  cas_adjust(st, first, is_durable ? SPACE_DURABLE : SPACE_WRITTEN, 0, 0);
  if (was_given) cas_segment(st, first)->is_given = 1;
  return 0;
}

/* Are there free pairs for all that is dirty, and more?  If not, gives space to
 * segments, twice as much as is needed: the next sync makes it count. */
static int cas_want_pairs(struct nbdserve_cas *st, uint32_t more) {
  uint32_t need = st->ndirty + more;
  int err = 0;
  if (st->failed || st->npairs >= need) return st->failed;
  while (!err && st->npairs + st->npending < 2 * need) {
    uint32_t first = st->back_cursor;
    assert(first <= st->nslots && first % CAS_SEGMENT == 0);
    if (first == st->nslots)
      err = cas_give_space(st, first);
    else if (cas_segment(st, first)->space == SPACE_UNKNOWN &&
             cas_segment(st, first)->npairs)
      cas_give_space(st, first); /* or it is passed over */
    if (!err) st->back_cursor += CAS_SEGMENT;
  }
  if (st->npairs >= need) return 0;
  return err ? err : -ENOSPC;
}

/* One more hold on a slot.  A free one is taken by that. */
static void cas_hold(struct nbdserve_cas *st, uint32_t slot) {
  if (!slot || slot == CAS_LOST) return;
  int32_t *refs = &CAS_AT(st, slot, refs);
  assert(*refs >= CAS_PENDING && *refs < INT32_MAX);
  if (*refs == 0) cas_set_free(st, slot, -1);
  *refs = *refs == CAS_PENDING ? 1 : *refs + 1;
}

/* One hold less.  After the last one the slot goes to a list that becomes free
 * later; that of a page with its twin, which has the one hold of the pair.
 * While the log is replayed a slot may yet come back: see cas_recover. */
static void cas_drop(struct nbdserve_cas *st, uint32_t slot, uint32_t *list) {
  if (!slot || slot == CAS_LOST || st->is_ending) return;
  int32_t *refs = &CAS_AT(st, slot, refs);
  assert(*refs > 0);
  if (--*refs > 0) return;
  int is_page = CAS_AT(st, slot, tag) == TAG_PAGE;
  int has_twin = is_page && slot % CAS_SEGMENT < CAS_TWIN;
  assert(!is_page || list != &st->dropped);
  if (is_page) cas_segment(st, slot)->npages--;
  cas_unindex(st, slot);
  if (is_page) CAS_AT(st, slot, tag) = TAG_RETIRED;
  *refs = CAS_PENDING;
  if (st->is_replaying && list == &st->dropped) return;
  CAS_AT(st, slot, link) = *list;
  *list = slot;
  st->nwaiting++;
  if (has_twin) cas_drop(st, slot + CAS_TWIN, list);
}

/* May a slot hold a block?  Pages are none, nor is what was one until it is
 * free; and it has to be in use. */
static int cas_may_be_block(struct nbdserve_cas *st, uint32_t slot) {
  return slot < st->nslots && CAS_AT(st, slot, tag) != TAG_PAGE &&
         CAS_AT(st, slot, tag) != TAG_RETIRED;
}

/* Frees a list of slots that nothing durable names any more; a long one in
 * portions.  (unlocks) */
static void cas_free_list(struct nbdserve_cas *st, uint32_t slot) {
  for (uint32_t n = 1, next; slot; slot = next, n++) {
    assert(CAS_AT(st, slot, refs) == CAS_PENDING);
    next = CAS_AT(st, slot, link);
    CAS_AT(st, slot, refs) = 0;
    CAS_AT(st, slot, tag) = TAG_NONE;
    cas_set_free(st, slot, 1);
    st->nwaiting--;
    if (n % CAS_LOOK == 0) cas_yield(st);
  }
}

/* What slots are taken for */
enum cas_need {
  NEED_SLOT,  /* data */
  NEED_LOOSE, /* data, while pairs are few: none that counts is taken apart */
  NEED_PAIR   /* a page */
};

/* How good it is to take slots from a segment: up to CAS_SEGMENT; 0: it has
 * none.  Slots in a row are written in a row, so for data much room is good,
 * and what has pages comes last.  Pages lie together, so that opening reads
 * long runs. */
static uint32_t cas_rate(const struct cas_segment *seg, enum cas_need need) {
  uint32_t npairs = seg->space == SPACE_DURABLE ? seg->npairs : 0;
  if (seg->space > SPACE_DURABLE) return 0;
  if (need == NEED_LOOSE) return seg->nfree - 2 * npairs;
  if (need == NEED_SLOT) return seg->npages ? seg->nfree > 0 : seg->nfree;
  if (!npairs) return 0;
  return seg->npages ? CAS_SEGMENT : 1 + (seg->nfree == CAS_SEGMENT);
}

/* Moves a cursor to the first segment that is good enough or, if there is none
 * among the next ones, to the best of these.  If none of these has a slot it
 * goes on to one that has.  Returns how good it is; 0: no segment will do. */
static uint32_t cas_search(struct nbdserve_cas *st, uint32_t *cursor,
                           enum cas_need need, uint32_t enough) {
  uint32_t n = st->nslots / CAS_SEGMENT;
  uint32_t first = *cursor / CAS_SEGMENT;
  uint32_t best = 0;
  for (uint32_t i = 0; i < n && best < enough && (!best || i < CAS_LOOK); i++) {
    uint32_t slot = (first + i) % n * CAS_SEGMENT;
    uint32_t rating = cas_rate(cas_segment(st, slot), need);
    if (rating > best) *cursor = slot;
    if (rating > best) best = rating;
  }
  return best;
}

/* Takes a free slot for data; *slot gets it, and the caller the hold.  Pairs
 * that pages may need are not taken apart for it: -ENOSPC.  At the end of each
 * segment it chooses the next one: one with much room, or a new one at the
 * file's end while the store has little to spare, else what there is. */
static int cas_take_slot(struct nbdserve_cas *st, uint32_t *slot) {
  uint32_t *cursor = &st->data_cursor;
  int loose = cas_want_pairs(st, CAS_RESERVE_PAIRS + CAS_MARGIN + 1) != 0;
  enum cas_need need = loose ? NEED_LOOSE : NEED_SLOT;
  if (st->failed) return st->failed;
  if (loose && st->nfree == 2 * st->npairs) cas_give_space(st, st->nslots);
  if (st->nfree == (loose ? 2 * st->npairs : 0)) return -ENOSPC;
  for (;; ++*cursor) {
    if (*cursor % CAS_SEGMENT == 0) {
      int has_spare = st->nfree > (st->nslots - st->nfree) / 10 + CAS_SLACK;
      uint32_t enough = has_spare ? CAS_SEGMENT / 4 : CAS_SEGMENT * 3 / 4;
      int makes_do = cas_search(st, cursor, need, enough) < enough;
      if (makes_do && !has_spare && !loose && !cas_give_space(st, st->nslots))
        *cursor = st->nslots - CAS_SEGMENT;
    }
    const struct cas_segment *seg = cas_segment(st, *cursor);
    if (CAS_AT(st, *cursor, refs) || seg->space > SPACE_DURABLE) continue;
    if (!loose || seg->space != SPACE_DURABLE ||
        CAS_AT(st, *cursor ^ CAS_TWIN, refs))
      break;
  }
  *slot = (*cursor)++;
  assert(*slot && CAS_AT(st, *slot, tag) == TAG_NONE);
  cas_hold(st, *slot);
  return 0;
}

/* Takes a pair of slots for a page, of which the first one gets the holds. */
static void cas_hold_pair(struct nbdserve_cas *st, uint32_t slot) {
  assert(slot && slot % CAS_SEGMENT < CAS_TWIN);
  for (int i = 0; i < 2; i++, slot += CAS_TWIN) {
    assert(!CAS_AT(st, slot, refs));
    cas_hold(st, slot);
    CAS_AT(st, slot, tag) = TAG_PAGE;
    cas_segment(st, slot)->npages++;
  }
}

/* Takes a free pair and returns the first of the two; the caller knows that
 * there is one. */
static uint32_t cas_take_pair(struct nbdserve_cas *st) {
  assert(st->npairs > 0);
  cas_search(st, &st->pair_cursor, NEED_PAIR, CAS_SEGMENT);
  uint32_t slot = st->pair_cursor;
  while (CAS_AT(st, slot, refs) || CAS_AT(st, slot + CAS_TWIN, refs))
    slot++;
  assert(slot < st->pair_cursor + CAS_TWIN);
  cas_hold_pair(st, slot);
  return slot;
}

/* Makes all that was written so far durable; one caller syncs for all that wait
 * meanwhile.  Who only wants its log to be durable waits no longer than until
 * that is so; others (always) for a sync that begins after the call.  (unlocks)
 */
static int cas_sync(struct nbdserve_cas *st, int always) {
  uint64_t mine = st->seq + (st->nlog > 0); /* behind the last entry */
  uint64_t begun = st->nsyncs; /* a sync that begins later covers us, too */
  while (st->syncing && (always ? st->nsynced <= begun : st->durable < mine))
    cas_wait(st);
  int is_done = always ? st->nsynced > begun : st->durable >= mine;
  if (st->failed || is_done) return st->failed;
  assert(!st->readonly && st->durable <= st->seq);
  st->syncing = 1;
  st->nsyncs++;
  cas_log_close(st); /* (C13) */
  uint64_t seq = st->seq;
  /* What was dropped so far is free when the pages that say so, which are
   * written by now, are durable; what is dropped from now on is not. */
  uint32_t dropped = st->dropped;
  st->dropped = 0;
  if (st->npending) cas_change_space(st, SPACE_WRITTEN, SPACE_SYNCING);
  cas_unlock(st);
  int err = os_datasync(st->fd);
  os_lock(&st->lock);
  cas_fail(st, err);
  if (!st->failed) {
    assert(st->durable <= seq && mine <= seq);
    st->durable = seq;          /* (C4) */
    cas_free_list(st, dropped); /* (C5) */
    if (st->npending) cas_space_is_durable(st);
    /* Where there was no space there may be some now. */
    if (dropped) cas_change_space(st, SPACE_FULL, SPACE_UNKNOWN);
  }
  st->nsynced = st->nsyncs;
  st->syncing = 0;
  os_wake_all(&st->lock);
  return st->failed;
}

/* ---- Blocks and pages -------------------------------------------------------
 * How data and pages go to the file and come back.  Both lie in slots, and a
 * request, a checkpoint or a scrub has many of them, so they are described by
 * an array of struct cas_block and moved together: what lies in a row goes in
 * one system call.  What fails together is tried again one by one, so an error
 * of the medium costs the block that it is about, and no other.
 *
 * The digest area says what each slot should hold.  For data that is the proof
 * when it is read; for a page it tells which of its two copies to believe, if
 * both are whole: a checkpoint that was never durable may have left one. */

/* cas_block.todo: what is to be moved or was moved, bits */
enum {
  CAS_DATA = 1,
  CAS_DIGEST = 2,
  CAS_BOTH = CAS_DATA | CAS_DIGEST,
  CAS_UNCHECKED = 4 /* cas_read: the digest as it stands there */
};

/* A block, or a page, on its way between a request and the file */
struct cas_block {
  uint64_t number;          /* of the block in its volume */
  unsigned char *data;      /* [block_size] */
  struct nbdserve_req *req; /* the request that it is a part of */
  uint32_t slot;            /* where it lies, with a hold; or 0 */
  uint32_t expected;        /* slot that the map must have, or CAS_ANY */
  int todo;                 /* CAS_DATA, CAS_DIGEST */
  int is_wanting;           /* it needs a slot */
  int is_trusted; /* the digest of its slot is known to fit the data */
  int is_known;   /* to be stored: only if its SHA-256 is `digest` */

  int err;        /* 0 or -errno */
  int digest_err; /* 0 or -errno: its digest could not be read */
  unsigned char sum[CAS_DIGEST_LEN];    /* SHA-256 of data */
  unsigned char digest[CAS_DIGEST_LEN]; /* what stands in the digest area */
};

#define CAS_ANNOUNCE (-1) /* says what will be read, instead of moving it */

/* Moves the data or the digests of k blocks that lie in a row.  how: OS_WRITE,
 * OS_READ, CAS_ANNOUNCE or, where that is known, OS_READ_NOW. */
static int cas_move_run(struct nbdserve_cas *st, struct cas_block *blk,
                        size_t k, int what, int how) {
  struct iovec v[CAS_BATCH];
  uint64_t off = what == CAS_DATA ? cas_data_off(st, blk->slot)
                                  : cas_digest_off(st, blk->slot);
  assert(k > 0 && k <= CAS_BATCH);
  assert(!(how == OS_WRITE && st->readonly));
  for (size_t i = 0; i < k; i++) {
    unsigned char *digest = how == OS_WRITE ? blk[i].sum : blk[i].digest;
    v[i] = (struct iovec){digest, CAS_DIGEST_LEN};
    if (what == CAS_DATA) v[i] = (struct iovec){blk[i].data, st->bs};
  }
  if (how == CAS_ANNOUNCE)
    os_advise(st->fd, POSIX_FADV_WILLNEED, off, k * v->iov_len);
  if (how == CAS_ANNOUNCE) return 0;
  if (how == OS_READ_NOW && !st->can_read_now) how = OS_READ;
  return os_transfer(st->fd, how, v, (int)k, off);
}

/* From now on nothing is taken from the segment of a slot that could not be
 * written (C19).  Its digests fill 4096 bytes, or a multiple of it, so a bad
 * sector there is no other segment's.  One that is being given back stays as it
 * is, and the failure is forgotten.  (locks) */
static void cas_pass_over(struct nbdserve_cas *st, uint32_t slot, int err) {
  assert(err && slot < st->nslots);
  os_lock(&st->lock);
  if (cas_segment(st, slot)->space != SPACE_BUSY)
    cas_adjust(st, slot, err == -ENOSPC ? SPACE_FULL : SPACE_BROKEN, 0, 0);
  cas_unlock(st);
}

/* Moves what there is to do of `what`, in few calls: k blocks that lie in a row
 * at a time.  What fails together is tried again one by one, so only that fails
 * which must.  how: OS_WRITE; OS_READ: at the first piece that is not in memory
 * all the rest is announced, so that the medium brings it together; or
 * OS_READ_NOW: what is not in memory gets -EAGAIN, where that can be told; a
 * block that has it already because of its digest has its data asked for, too.
 * (locks) */
static void cas_move(struct nbdserve_cas *st, struct cas_block *blk, size_t n,
                     int what, int how) {
  int now = how == OS_READ && n > 1 ? OS_READ_NOW : how;
  for (size_t k; n > 0; blk += k, n -= k) {
    for (k = 0; k < n && k < CAS_BATCH; k++)
      if (!(blk[k].todo & what) ||
          (blk[k].err && !(how == OS_READ_NOW && blk[k].err == -EAGAIN)) ||
          (k && (blk[k].slot % CAS_SLOTS == 0 || blk[k].slot != blk->slot + k)))
        break;
    int err = k ? cas_move_run(st, blk, k, what, now) : 0;
    if (err && now != how) {
      now = how;
      cas_move(st, blk, n, what, CAS_ANNOUNCE);
      err = cas_move_run(st, blk, k, what, now);
    }
    for (size_t i = 0; err && i < k; i++) {
      int alone = k > 1 ? cas_move_run(st, blk + i, 1, what, now) : err;
      int is_only_digest =
          what == CAS_DIGEST && how != OS_WRITE && alone != -EAGAIN;
      if (!alone) continue; /* an error it may have is its digest's */
      *(is_only_digest ? &blk[i].digest_err : &blk[i].err) = alone;
      if (how == OS_WRITE) cas_pass_over(st, blk[i].slot, alone);
    }
    if (!k) k = 1; /* there is nothing to do of the first one */
  }
}

/* Moves data and digests.  The digests come last, so that where a write finds
 * no space for the data they still say that it was given back.  (locks) */
static void cas_move_both(struct nbdserve_cas *st, struct cas_block *blk,
                          size_t n, int how) {
  cas_move(st, blk, n, CAS_DATA, how);
  cas_move(st, blk, n, CAS_DIGEST, how);
}

/* Computes the digests of the blocks that have both to do, two at a time. */
static void cas_hash(struct nbdserve_cas *st, struct cas_block *blk, size_t n) {
  struct cas_block *first = NULL;
  for (; n > 0; blk++, n--) {
    if (blk->todo != CAS_BOTH || blk->err) continue;
    if (first)
      sha_256(st->hw, first->data, blk->data, st->bs, first->sum, blk->sum);
    first = first ? NULL : blk;
  }
  if (first) sha_256(st->hw, first->data, NULL, st->bs, first->sum, NULL);
}

/* Reads what is to do of blocks (todo), and checks those of which that is both.
 * Each gets its own error; -EUCLEAN: the data is not what it was.  Data whose
 * digest cannot be read is not bad: the digest is computed from it.  how:
 * OS_READ or OS_READ_NOW. */
static void cas_fetch(struct nbdserve_cas *st, struct cas_block *blk, size_t n,
                      int how) {
  cas_move(st, blk, n, CAS_DIGEST, how);
  for (size_t i = 0; i < n; i++)
    if (blk[i].digest_err) blk[i].todo = CAS_BOTH;
  cas_move(st, blk, n, CAS_DATA, how);
  cas_hash(st, blk, n);
  for (; n > 0; blk++, n--) {
    if (blk->todo != CAS_BOTH || blk->err) continue;
    if (blk->digest_err)
      memcpy(blk->digest, blk->sum, CAS_DIGEST_LEN);
    else if (memcmp(blk->digest, blk->sum, CAS_DIGEST_LEN) != 0)
      blk->err = -EUCLEAN;
  }
}

/* Is a copy of a page, by itself, what its reader is after: whole, of a page
 * with that head (of magic 0: of any page), and not of a checkpoint that never
 * became durable?  *number: that of its checkpoint. */
static int cas_is_page(struct nbdserve_cas *st, struct cas_block *copy,
                       const struct cas_head *head, uint64_t *number) {
  struct cas_head own;
  assert(copy->data);
  if (copy->err || !cas_sum_page(st->hw, copy->data, st->bs, copy->sum))
    return 0;
  cas_decode(cas_head_sizes, copy->data, &own);
  *number = own.number;
  if (own.number > head->number) return 0;
  if (!head->magic) return own.magic == CAS_MAP || own.magic == CAS_CAT;
  return memcmp(&own, head, offsetof(struct cas_head, number)) == 0;
}

/* Reads the page in a slot to p, which has room for two, and its twin only if
 * the page does not fit both digests, or any page will do: then both are
 * checked.  head: see cas_is_page.  Of the copies (C17) it takes the one with
 * the higher rank or, if these are equal, the newer one:
 *
 *   0   it is no such page
 *   1   it is, but no digest says so
 *   2   one digest vouches for it, or no digest can be read
 *   3   both vouch for it
 *
 * It takes none if there is one of rank 1 only.  Two of rank 1 are whole, but
 * both digests are wrong.  Where one copy is damaged, both are written anew: if
 * that fails, it is tried again whenever the page is read.  -EIO: no copy is
 * good, and one cannot be read; -EUCLEAN: both can.  (locks) */
static int cas_read_page(struct nbdserve_cas *st, uint32_t slot,
                         struct cas_head head, unsigned char *p) {
  struct cas_block copy[2] = {
      {.slot = slot, .data = p, .todo = CAS_BOTH},
      {.slot = slot + CAS_TWIN, .data = p + st->bs, .todo = CAS_BOTH}};
  uint64_t number[2] = {0, 0};
  int rank[2] = {0, 0};
  assert(slot % CAS_SEGMENT < CAS_TWIN);
  for (int i = 0; i < 2; i++) {
    cas_move(st, copy + i, 1, CAS_DATA, OS_READ);
    if (i == 0) cas_move(st, copy, 2, CAS_DIGEST, OS_READ);
    if (!cas_is_page(st, copy + i, &head, number + i)) continue;
    rank[i] = copy[0].digest_err && copy[1].digest_err ? 2 : 1;
    for (int k = 0; k < 2; k++)
      rank[i] += !copy[k].digest_err &&
                 memcmp(copy[i].sum, copy[k].digest, CAS_DIGEST_LEN) == 0;
    if (rank[0] == 3 && (head.magic || rank[1] == 3)) return 0;
  }
  if (rank[0] + rank[1] < 2)
    return copy[0].err || copy[1].err ? -EIO : -EUCLEAN;
  int i = rank[1] > rank[0] || (rank[1] == rank[0] && number[1] > number[0]);
  if (i == 1) memcpy(p, copy[1].data, st->bs);
  assert(!copy[i].err);
  copy[!i] = copy[i];
  copy[0].slot = slot;
  copy[1].slot = slot + CAS_TWIN;
  if (!st->readonly) cas_move_both(st, copy, 2, OS_WRITE);
  return 0;
}

/* ---- The tree of nodes ------------------------------------------------------
 * Maps are never changed where they lie.  Who wants to change a block makes all
 * nodes on the way to it its own and dirty (cas_own): a node that others have,
 * too, is copied, and everything below it gains an edge; one that is stored
 * gives its slots to `retired` and gets new ones from the next checkpoint.  A
 * snapshot or a clone is one more edge to a root, whatever its size.
 *
 * To follow a map may need a leaf that is not in memory.  Reading it lets the
 * lock go, and then everything may have changed; so cas_find_spot walks again
 * from the root until it comes to the end without reading.  What it returns is
 * true until its caller lets the lock go. */

/* A new node that nothing leads to but the caller, dirty (slot 0) or lost; NULL
 * without memory. */
static struct cas_node *cas_new_node(int level, uint32_t index, uint32_t slot) {
  struct cas_node *node = NBDSERVE_MALLOC(sizeof *node);
  if (!node) return NULL;
  *node = (struct cas_node){
      .refs = 1, .level = (unsigned char)level, .index = index, .slot = slot};
  return node;
}

/* Kid c of a node; NULL: there is none, nor is there anything below that.  What
 * is lost stands for all that was below it, so its level may be a higher one,
 * and it may have many edges. */
static struct cas_node *cas_kid(struct cas_node *node, uint64_t c) {
  if (!node || node->slot == CAS_LOST) return node;
  return c < node->nkids ? node->kid[c] : NULL;
}

/* What the head of a node's page says; its number is that of the newest durable
 * checkpoint, or less. */
static struct cas_head cas_head_of(const struct nbdserve_cas *st,
                                   const struct cas_node *node) {
  uint32_t magic = node->level < CAS_LEVELS ? CAS_MAP : CAS_CAT;
  return (struct cas_head){magic, node->level, node->index, st->super.number};
}

/* Where the map of a volume has its root. */
static struct cas_node **cas_root(const struct cas_volume *vol) {
  uint32_t c = vol->place % vol->st->per_page;
  return &vol->page->kid[2 * c + (vol->is_tree ? 1 : 0)];
}

/* Where the map with the tree of its id has its root. */
static struct cas_node **cas_digests(const struct cas_volume *vol) {
  return cas_root(vol) + 1;
}

/* Makes an edge lead to a node, or to none (C13). */
static void cas_share(struct cas_node **edge, struct cas_node *node) {
  *edge = node;
  if (node) node->refs++;
}

/* Frees the slots of a leaf: it is no longer in memory. */
static void cas_forget_leaf(struct nbdserve_cas *st, struct cas_node *leaf) {
  if (!leaf->slots) return;
  struct cas_node *last = st->leaves[--st->nleaves];
  assert(st->leaves[leaf->at] == leaf);
  st->leaves[leaf->at] = last;
  last->at = leaf->at;
  NBDSERVE_FREE(leaf->slots);
  leaf->slots = NULL;
}

/* When the budget is used up: drops leaves that were not used since the hand
 * passed them last.  They can be read back: they are clean, and the superblock
 * that names them is durable. */
static void cas_evict_leaf(struct nbdserve_cas *st) {
  /* It stops at the end: a leaf that fills a gap was not looked at yet. */
  for (int n = 0; n < CAS_PORTION && st->hand < st->nleaves; n++) {
    if (st->nleaves * (uint64_t)st->bs < st->cache) break;
    struct cas_node *leaf = st->leaves[st->hand];
    assert(leaf->slots && leaf->at == st->hand);
    int goes = !leaf->is_used && leaf->slot && !leaf->is_given;
    leaf->is_used = 0;
    if (goes)
      cas_forget_leaf(st, leaf); /* another one is in its place */
    else
      st->hand++;
  }
  if (st->hand >= st->nleaves) st->hand = 0; /* before one is added there */
}

/* Gives a leaf its slots: those of a page or, if that is NULL, all of them
 * `fill`.  What cannot be the slot of a block is lost. */
static int cas_make_leaf(struct nbdserve_cas *st, struct cas_node *leaf,
                         const unsigned char *page, uint32_t fill) {
  assert(!leaf->level && !leaf->slots);
  cas_evict_leaf(st);
  if (!cas_enlarge(&st->leaves, &st->leaf_room, st->nleaves))
    leaf->slots = NBDSERVE_MALLOC(st->fanout * sizeof *leaf->slots);
  if (!leaf->slots) return -ENOMEM;
  for (uint32_t c = 0; c < st->fanout; c++) {
    uint32_t slot = page ? u_get32(page + CAS_HEAD + 4 * c) : fill;
    leaf->slots[c] = cas_may_be_block(st, slot) ? slot : CAS_LOST;
  }
  leaf->at = st->nleaves;
  leaf->is_used = 1;
  st->leaves[st->nleaves++] = leaf;
  return 0;
}

/* Where a block's slot stands in a map */
struct cas_spot {
  struct cas_node *leaf; /* in memory; NULL: it is below a hole, or lost */
  uint32_t slot;         /* of the block; 0; or CAS_LOST */
  uint64_t span;         /* blocks from it on of which the leaf, or the lack of
                            one, is the same */
  int gives_back;        /* all pages to it are there, and the map's own: to
                            change one gives back as many pairs as it takes */
};

/* Follows a map to a block.  Returns the leaf if it has to be read first.  The
 * map may be a leaf that stands alone: then the span is too long. */
static struct cas_node *cas_walk(struct nbdserve_cas *st, struct cas_node *node,
                                 uint64_t block, struct cas_spot *spot) {
  uint64_t size = st->max_blocks; /* below node */
  int is_own = 1;
  assert(block < st->max_blocks);
  while (node && node->slot != CAS_LOST) {
    is_own &= node->refs == 1;
    if (!node->level) break;
    size /= st->fanout;
    node = cas_kid(node, block / size % st->fanout);
  }
  *spot = (struct cas_spot){.span = size - block % size};
  if (node) spot->slot = CAS_LOST; /* unless it turns out to be a leaf */
  if (!node || node->slot == CAS_LOST) return NULL;
  assert(!node->level);
  if (!node->slots) return node;
  node->is_used = 1;
  spot->leaf = node;
  spot->slot = node->slots[block % st->fanout];
  spot->gives_back = is_own;
  return NULL;
}

/* Follows a map to a block, and reads the leaf if it is not in memory.  As that
 * lets the lock go, it walks once more: only if there still is a leaf with the
 * same page, what was read is what it has.  (unlocks, but not after the walk
 * that succeeds) */
static int cas_find_spot(struct nbdserve_cas *st, struct cas_node **root,
                         uint64_t block, struct cas_spot *spot) {
  unsigned char *page = NULL;
  struct cas_node *leaf;
  int err = 0;
  assert(block < st->max_blocks);
  while (!err && (leaf = cas_walk(st, *root, block, spot))) {
    struct cas_head head = cas_head_of(st, leaf);
    uint32_t slot = leaf->slot;
    assert(slot && slot != CAS_LOST && CAS_AT(st, slot, tag) == TAG_PAGE);
    if (!page) page = NBDSERVE_MALLOC(2 * (size_t)st->bs);
    if (!page) return -ENOMEM;
    cas_hold(st, slot); /* so that the pair is not taken meanwhile */
    cas_unlock(st);
    err = cas_read_page(st, slot, head, page) ? -EIO : 0;
    os_lock(&st->lock);
    cas_drop(st, slot, &st->retired);
    leaf = err ? NULL : cas_walk(st, *root, block, spot);
    if (leaf && leaf->slot == slot) err = cas_make_leaf(st, leaf, page, 0);
  }
  NBDSERVE_FREE(page);
  return err;
}

/* Takes an edge off a node, after the last one off all below it, and lets
 * others have the lock.  A leaf that cannot be read leaves its edges counted
 * until the store is opened anew. (unlocks) */
static void cas_unref(struct nbdserve_cas *st, struct cas_node *node) {
  assert(!node || node->refs > 0);
  if (!node || --node->refs > 0) return;
  struct cas_spot spot;
  for (uint32_t c = 0; c < node->nkids; c++)
    cas_unref(st, node->kid[c]);
  if (!node->level && node->slot && !st->is_ending) /* a map of one leaf */
    (void)!cas_find_spot(st, &node, 0, &spot);
  for (uint32_t c = 0; node->slots && c < st->fanout; c++)
    cas_drop(st, node->slots[c], &st->retired);
  cas_forget_leaf(st, node);
  if (!node->slot) st->ndirty--;
  cas_drop(st, node->slot, &st->retired);
  NBDSERVE_FREE(node->kid);
  NBDSERVE_FREE(node);
  cas_yield(st);
}

/* Makes a node, which is to change, dirty, and puts its slots into a list. */
static void cas_make_dirty(struct nbdserve_cas *st, struct cas_node *node,
                           uint32_t *list) {
  if (node->slot) st->ndirty++;
  cas_drop(st, node->slot, list);
  node->slot = 0;
}

/* Makes the node at *p, which is to change, or to be there, its parent's own
 * and dirty.  Of a node that others have, too, a copy gets what is below it,
 * and all of that gains an edge (C13).  Where there is none, zeroes are below
 * the new one.  A leaf that is shared has to be in memory.  What is lost is its
 * own kid, as often as there is room (cas_kid), and the slots of a leaf. */
static int cas_own(struct nbdserve_cas *st, struct cas_node **p, int level,
                   uint32_t index) {
  struct cas_node *node = *p;
  int is_lost = node && node->slot == CAS_LOST;
  int err = 0;
  assert(!st->is_ending);
  assert(!node || is_lost || (node->level == level && node->index == index));
  if (node && node->refs == 1 && !is_lost) {
    cas_make_dirty(st, node, &st->retired);
    return 0;
  }
  assert(!node || level < CAS_LEVELS); /* the catalog is not shared */
  struct cas_node *copy = cas_new_node(level, index, 0);
  if (!copy) return -ENOMEM;
  st->ndirty++;
  for (uint32_t c = 0; level > 0 && c < st->fanout && !err; c++) {
    struct cas_node *kid = cas_kid(node, c);
    if (kid) err = cas_enlarge(&copy->kid, &copy->nkids, c);
    if (kid && !err) cas_share(&copy->kid[c], kid);
  }
  if (!level) err = cas_make_leaf(st, copy, NULL, is_lost ? CAS_LOST : 0);
  assert(level || !node || is_lost || node->slots); /* eviction spared it */
  if (copy->slots && node && !is_lost)
    memcpy(copy->slots, node->slots, st->fanout * sizeof *copy->slots);
  for (uint32_t c = 0; copy->slots && c < st->fanout; c++)
    cas_hold(st, copy->slots[c]);
  if (err) {
    cas_unref(st, copy); /* with the edges that it has got so far */
    return err;
  }
  if (node && --node->refs == 0) NBDSERVE_FREE(node); /* it was lost */
  *p = copy;
  return 0;
}

/* Makes all nodes on the way from a root, which is at *p, down to the one with
 * an index in a level own and dirty; what is not there yet is made.  *out: that
 * node; a page of records has room for both maps of each.  After an error nodes
 * may be dirty that did not change, which does no harm. */
static int cas_own_path(struct nbdserve_cas *st, struct cas_node **p, int level,
                        uint64_t index, struct cas_node **out) {
  struct cas_node *up = NULL;
  if (level != CAS_TOP && level != CAS_LEVELS - 1) { /* it is no root */
    uint32_t c = (uint32_t)(index % st->fanout);
    int err = cas_own_path(st, p, level + 1, index / st->fanout, &up);
    if (!err) err = cas_enlarge(&up->kid, &up->nkids, c);
    if (err) return err;
    assert(up->refs == 1 && !up->slot);
    p = &up->kid[c];
  }
  int err = cas_own(st, p, level, (uint32_t)index);
  if (err) return err;
  assert(level < CAS_LEVELS || !*out || *out == *p); /* a page stays there */
  *out = *p;
  if (level != CAS_LEVELS) return 0;
  return cas_enlarge(&(*p)->kid, &(*p)->nkids, 2 * st->per_page - 1);
}

/* Makes all nodes own and dirty from the catalog's root down to the page with
 * the record in a place, which is returned in *page. */
static int cas_own_record(struct nbdserve_cas *st, uint32_t place,
                          struct cas_node **page) {
  uint32_t index = place / st->per_page;
  return cas_own_path(st, &st->catalog, CAS_LEVELS, index, page);
}

/* Makes all nodes on the way to a block of a volume own and dirty, and returns
 * its leaf.  The spot must have been found since the lock was taken. */
static int cas_own_leaf(struct cas_volume *vol, uint64_t block,
                        struct cas_node **leaf) {
  struct nbdserve_cas *st = vol->st;
  int err = cas_own_record(st, vol->place, &vol->page);
  if (err) return err;
  return cas_own_path(st, cas_root(vol), 0, block / st->fanout, leaf);
}

/* ---- Volumes and their names ------------------------------------------------
 * A change of the catalog is seen by all at once, when the checkpoint that has
 * it is durable, or never.  So a volume has its record twice: `now` is what
 * everybody sees, and `then` what it will be; they are the same while nothing
 * is staged.  Several changes in one checkpoint are tested one after the other
 * against `then`; that is how "snapshot A@x, rename A to B" fails or succeeds
 * as a whole.
 *
 * All volumes are in one list, in the order of their ids.  The record says of
 * which kind each is:
 *
 *   kind       flags             its name      who can find it
 *   volume     0                 VOL           everybody
 *   snapshot   CAS_IS_SNAPSHOT   VOL@NAME      everybody; if it is sealed, by
 *                                              its content id, too
 *   partial    CAS_IS_PARTIAL    ID/partial    the pull that fills it; changes,
 *                                              to remove it
 *   hidden     no id in either   VOL, or none  who fills it; nobody else, but
 *              of its records                  the name is taken
 *
 * A place is where a record lies in the catalog: pages of per_page records, one
 * behind the other.  Places are used again, ids never are. */

/* Which volumes a name may be that of */
enum cas_view {
  VIEW_NOW,     /* those that are there */
  VIEW_THEN,    /* those that are there when what is staged holds, */
  VIEW_RESERVED /* and those that are hidden */
};

/* Writes the full name, VOL or VOL@SNAP, to out, and returns out. */
static char *cas_full_name(const struct cas_volume *vol, char out[CAS_PATH]) {
  const char *up = vol->parent ? vol->parent->now.name : "";
  snprintf(out, CAS_PATH, "%s%s%s", up, vol->parent ? "@" : "", vol->now.name);
  return out;
}

/* Writes the content id, "sha256-HEX", to id, or "" if the volume has none, and
 * returns id. */
static char *cas_spell_id(const struct cas_volume *vol, char id[72]) {
  const unsigned char *h = vol->now.cid;
  strcpy(id, u_is_zero(h, CAS_DIGEST_LEN) ? "" : "sha256-");
  for (int i = 0; *id && i < CAS_DIGEST_LEN; i += 8)
    snprintf(id + 7 + 2 * i, 17, "%016" PRIx64, u_get64(h + i));
  return id;
}

/* Is the name of n bytes that of a volume or snapshot, or its content id?  Of a
 * partial volume, whose name is ID/partial, only changes know. */
static int cas_is_called(const struct cas_volume *vol, const char *name,
                         size_t n, enum cas_view view) {
  const struct cas_record *record = view == VIEW_NOW ? &vol->now : &vol->then;
  const char *at = memchr(name, '@', n);
  const char *own = at ? at + 1 : name;
  size_t len = n - (size_t)(own - name);
  char id[72];
  if (!record->id && !(view == VIEW_RESERVED && vol->clients)) return 0;
  if (record->flags == CAS_IS_PARTIAL && view == VIEW_NOW) return 0;
  if (n == 71 && memcmp(name, "sha256-", 7) == 0)
    return memcmp(cas_spell_id(vol, id), name, n) == 0;
  if (!at != !vol->parent) return 0;
  if (strncmp(record->name, own, len) != 0 || record->name[len]) return 0;
  return !at || cas_is_called(vol->parent, name, (size_t)(at - name), view);
}

/* The volume or snapshot of that name, of n bytes, or content id, or NULL. */
static struct cas_volume *cas_find(struct nbdserve_cas *st, const char *name,
                                   size_t n, enum cas_view view) {
  for (uint32_t i = 0; i < st->nvolumes; i++)
    if (cas_is_called(st->volumes[i], name, n, view)) return st->volumes[i];
  return NULL;
}

/* The first volume that anybody sees with an id from one on, or NULL.  Who goes
 * through all volumes, and lets the lock go in between, remembers the id and
 * not a place in the list: volumes come and go meanwhile. */
static struct cas_volume *cas_from_id(struct nbdserve_cas *st, uint64_t id) {
  uint32_t i = 0;
  for (uint32_t end = st->nvolumes; i < end;) { /* it is from i up to there */
    uint32_t middle = i + (end - i) / 2;
    if (st->volumes[middle]->id < id)
      i = middle + 1;
    else
      end = middle;
  }
  while (i < st->nvolumes && !st->volumes[i]->now.id)
    i++;
  return i < st->nvolumes ? st->volumes[i] : NULL;
}

/* The volume or snapshot with an id that anybody sees, or NULL. */
static struct cas_volume *cas_by_id(struct nbdserve_cas *st, uint64_t id) {
  struct cas_volume *vol = cas_from_id(st, id);
  return vol && vol->id == id ? vol : NULL;
}

/* Is it the content id of a snapshot, with a suffix behind it? */
static int cas_is_id(const char *p, const char *suffix) {
  return strncmp(p, "sha256-", 7) == 0 &&
         strspn(p + 7, "0123456789abcdef") == 64 && strcmp(p + 71, suffix) == 0;
}

/* May a volume or snapshot have that name (of a snapshot: the part behind the
 * `@`)?  It is UTF-8; what could be taken for a content id is none, and neither
 * is what would need escapes in messages, or ends a name elsewhere. */
static int cas_is_name(const char *p) {
  size_t n = strncmp(p, "sha256-", 7) ? strlen(p) : 0;
  while (*p && u_utf8_len(p) && !strchr("/@\"\\", *p))
    p += u_utf8_len(p);
  return n > 0 && n <= CAS_NAME && !*p;
}

/* Gives a record its name, if it may have that: with up, it is that of a
 * snapshot of this volume.  -EEXIST: another one has the name. */
static int cas_give_name(struct nbdserve_cas *st, const struct cas_volume *up,
                         const char *name, struct cas_record *record) {
  const char *at = strchr(name, '@');
  const char *own = at ? at + 1 : name;
  if (!cas_is_name(own) || strncmp(name, "sha256-", 7) == 0 || !at != !up ||
      (at && !cas_is_called(up, name, (size_t)(at - name), VIEW_THEN)))
    return -EINVAL;
  if (cas_find(st, name, strlen(name), VIEW_RESERVED)) return -EEXIST;
  /* With zeroes behind it: nothing of an older name gets into the file. */
  strncpy(record->name, own, CAS_NAME);
  return 0;
}

static void cas_batch(void *ctx, struct nbdserve_req *r, size_t n);

/* Adds a volume with that record to the list, behind all others, and to the
 * places of the catalog; NULL without memory.  If the record has no id, as
 * nobody is to see the volume yet, the volume gets a new one. */
static struct cas_volume *cas_add_volume(struct nbdserve_cas *st,
                                         struct cas_node *page, uint32_t place,
                                         const struct cas_record *record) {
  struct cas_volume *vol = u_zalloc(sizeof *vol);
  if (!vol || cas_enlarge(&st->by_place, &st->places, place) ||
      cas_enlarge(&st->volumes, &st->volume_room, st->nvolumes)) {
    NBDSERVE_FREE(vol);
    return NULL;
  }
  assert(!st->by_place[place]);
  vol->own.run_batch = cas_batch;
  vol->st = st;
  vol->page = page;
  vol->place = place;
  vol->id = record->id ? (uint32_t)record->id : st->next_id++;
  vol->now = vol->then = *record;
  st->by_place[place] = vol;
  st->volumes[st->nvolumes++] = vol;
  return vol;
}

/* ---- Changes of the catalog -------------------------------------------------
 *
 *   cas_stage    tests all changes, and makes their nodes dirty; on an error
 *                nothing is changed but that
 *   the cut      writes down what `then` says
 *   cas_settle   is_durable: `then` becomes `now`; else `then` is forgotten.
 *                What nobody has any more is freed.
 *
 * All of this is done by who holds ckpt, so there is one change at a time.  The
 * life of a change:
 *
 *   volume       `now`        `then`       while the checkpoint is written
 *   that comes   no id        its record   nobody finds it; its name is taken
 *   that goes    its record   no id        it is found, but who wants to use it
 *                                          waits for the end (is_staged)
 *   else         as it was    as it is     the same
 *                             to be
 *
 * The contents of a volume are not in its record, but below two edges of its
 * page.  Where a change makes one of these lead elsewhere, it does so at once,
 * as nobody uses the volume then, and remembers where it led (edge, was). */

/* What a checkpoint is to change */
struct cas_change {
  const struct nbdserve_cas_op *ops; /* [nops]: all of them or none */
  size_t nops;
  size_t failed; /* the one that is at fault */
  uint32_t kept; /* free pairs that it leaves alone */
  /* With nops 0 it is one of three:
   *   vol and tree           vol, a snapshot, is sealed
   *   vol, tree and name     a snapshot appears, sealed, with vol's contents
   *   name and size          a partial volume appears; tree, if there is one,
   *                          is its base
   * Of a seal, tree has the digests as its data, and the content id. */
  struct cas_volume *vol;
  struct cas_volume *tree;
  const char *name;
  uint64_t size; /* bytes */
};

/* Stages a new volume, or a snapshot of `up`, with the contents of `from` or,
 * if that is NULL, of that size and all zeroes; and finds a place for its
 * record.  name: NULL, or it is tested that the volume may have it.
 *
 * That costs the same whatever the size of `from`: the map of the new volume is
 * one more edge to the same root, and nodes are copied when one of both changes
 * (C13).  Nothing can fail once the volume is in the list. */
static int cas_stage_new(struct nbdserve_cas *st, struct cas_volume *from,
                         struct cas_volume *up, const char *name, uint64_t size,
                         struct cas_volume **out) {
  struct cas_record record = {.flags = up ? CAS_IS_SNAPSHOT : 0,
                              .size = from ? from->then.size : size,
                              .levels = CAS_LEVELS,
                              .created = (uint64_t)time(NULL),
                              .made_from = from ? from->id : 0};
  struct cas_node *page = NULL;
  uint32_t place = 0;
  if (up) record.made_from = up->id;
  /* The first place that is free: so the catalog has few pages. */
  while (place < st->places && st->by_place[place])
    place++;
  int is_full = place / st->per_page >= st->fanout * st->fanout ||
                st->next_id == UINT32_MAX;
  int err = is_full ? -ENOSPC : 0;
  if (!err && name) err = cas_give_name(st, up, name, &record);
  if (!err) err = cas_own_record(st, place, &page);
  if (err) return err;
  *out = cas_add_volume(st, page, place, &record);
  if (!*out) return -ENOMEM;
  assert(!up || !up->parent);
  (*out)->parent = up;
  (*out)->is_staged = 1;
  (*out)->then.id = (*out)->id; /* it is there when the checkpoint is durable */
  if (from) cas_share(cas_root(*out), *cas_root(from));
  return 0;
}

/* Makes an edge of a volume that is staged lead to another node.  The edge to
 * the node where it led is kept, and is taken off in cas_settle, or comes
 * back. */
static void cas_stage_edge(struct cas_volume *vol, struct cas_node **edge,
                           struct cas_node *node) {
  assert(vol->is_staged && !vol->edge && !vol->was);
  vol->edge = edge;
  vol->was = *edge;
  cas_share(edge, node);
}

/* Stages the snapshot VOL@NAME, *out, with the contents of `from`, and VOL with
 * the same, if there is none.  If they were pulled for that, `from` goes: it is
 * the partial volume, whose blocks the snapshot has from now on.  Else `from`
 * is a snapshot with the same id, which was here before. (unlocks) */
static int cas_stage_pulled(struct nbdserve_cas *st, struct cas_volume *from,
                            const char *name, struct cas_volume **out) {
  char up_name[CAS_PATH];
  snprintf(up_name, sizeof up_name, "%.*s", (int)strcspn(name, "@"), name);
  struct cas_volume *up = cas_find(st, up_name, strlen(up_name), VIEW_THEN);
  int err = up ? 0 : cas_stage_new(st, from, NULL, up_name, 0, &up);
  if (!err) err = cas_stage_new(st, from, up, name, 0, out);
  if (err || from->now.flags != CAS_IS_PARTIAL) return err;
  while (from->pins)
    cas_wait(st);
  from->then.id = 0;
  return 0;
}

/* Stages one change.  Nothing is to be seen of it until cas_settle.  What would
 * pull the ground from under a client's feet (ROLLBACK, RESIZE, RM) needs a
 * volume that nobody uses; readers that are done in a moment, such as verify,
 * are waited for.  (unlocks) */
static int cas_stage_op(struct nbdserve_cas *st,
                        const struct nbdserve_cas_op *op) {
  int dry_run = op->verb & NBDSERVE_CAS_DRY_RUN;
  int verb = op->verb - dry_run;
  int is_rm = verb == NBDSERVE_CAS_RM;
  int needs_closed = verb > NBDSERVE_CAS_RENAME; /* ROLLBACK, RESIZE, RM */
  struct cas_volume *new;
  if (verb < NBDSERVE_CAS_CREATE || verb > NBDSERVE_CAS_RM ||
      !cas_is_size(st, op->size) || (dry_run && !needs_closed))
    return -EINVAL;
  if (is_rm) cas_yield(st); /* there may be thousands, and as many volumes */
  size_t n = strcspn(op->name, verb == NBDSERVE_CAS_SNAPSHOT ? "@" : "");
  struct cas_volume *vol = cas_find(st, op->name, n, VIEW_THEN);
  if (verb == NBDSERVE_CAS_CREATE)
    return cas_stage_new(st, NULL, NULL, op->name, op->size, &new);
  if (!vol || (vol->then.flags == CAS_IS_PARTIAL && !is_rm)) return -ENOENT;
  if (verb == NBDSERVE_CAS_SNAPSHOT)
    return cas_stage_new(st, vol, vol, op->name, 0, &new);
  if (verb == NBDSERVE_CAS_CLONE)
    return cas_stage_new(st, vol, NULL, op->to, 0, &new);
  /* A rollback is found by its snapshot, and changes the volume of that. */
  struct cas_volume *snapshot = vol;
  if (verb == NBDSERVE_CAS_ROLLBACK) vol = vol->parent;
  if (!vol || (verb == NBDSERVE_CAS_RESIZE && vol->parent)) return -EINVAL;
  while (needs_closed && vol->pins)
    cas_wait(st);
  if (needs_closed && vol->clients) return -EBUSY;
  for (uint32_t i = 0; i < st->nvolumes; i++) {
    const struct cas_volume *p = st->volumes[i];
    if (is_rm && p->parent == vol && p->then.id) return -ENOTEMPTY;
    if (p != snapshot && cas_is_called(p, op->name, n, VIEW_THEN))
      return -EINVAL; /* several have that id */
  }
  vol->is_staged = 1;
  if (is_rm) vol->then.id = 0;
  if (verb == NBDSERVE_CAS_RESIZE) vol->then.size = op->size;
  int err =
      needs_closed ? 0 : cas_give_name(st, vol->parent, op->to, &vol->then);
  if (!err && !dry_run) err = cas_own_record(st, vol->place, &vol->page);
  if (err || verb != NBDSERVE_CAS_ROLLBACK) return err;
  if (vol->edge) return -EINVAL; /* once in a change is enough */
  cas_stage_edge(vol, cas_root(vol), *cas_root(snapshot));
  vol->then.size = snapshot->then.size;
  return 0;
}

/* Stages all of a change, in order: each is tested against what those before it
 * make of the catalog.  Finds out how many free pairs it leaves alone (C20):
 * the strictest of its parts decides.
 *
 *   what comes into being           leaves the whole reserve
 *   RENAME, ROLLBACK, RESIZE        give back what they take, so they may use
 *                                   it, but not the last pairs
 *   RM                              may use these, too: it is the way out of a
 *                                   store that is full
 *
 * Without ops it is one of the other kinds of change: see struct cas_change.
 * (unlocks) */
static int cas_stage(struct nbdserve_cas *st, struct cas_change *change) {
  struct cas_volume *vol = change->vol;
  struct cas_volume *tree = change->tree;
  const char *name = change->name;
  int err = 0;
  change->kept = vol || name ? CAS_RESERVE_PAIRS : 0;
  for (size_t i = 0; i < change->nops && !err; i++) {
    int verb = change->ops[i].verb;
    uint32_t kept = verb != NBDSERVE_CAS_RM ? CAS_FOR_RM : 0;
    if (verb < NBDSERVE_CAS_RENAME) kept = CAS_RESERVE_PAIRS;
    if (kept > change->kept) change->kept = kept;
    change->failed = i;
    err = cas_stage_op(st, change->ops + i);
    if (!err && i + 1 == change->nops && verb & NBDSERVE_CAS_DRY_RUN)
      err = -ECANCELED; /* all of it could be done */
  }
  /* A partial volume, with the contents of the base that it begins with. */
  if (!vol && name && !cas_find(st, name, strlen(name), VIEW_THEN)) {
    err = cas_stage_new(st, tree, NULL, NULL, change->size, &vol);
    if (err) return err;
    vol->then.flags = CAS_IS_PARTIAL;
    vol->then.size = change->size;
    strcpy(vol->then.name, name);
    return 0;
  }
  if (!vol) return err; /* or others have made that partial volume meanwhile */
  /* A volume that was hidden appears, or a snapshot gets its id and its tree:
   * its own, or the new one that is made of it. */
  vol->is_staged = 1;
  vol->then.id = vol->id; /* it may be hidden as yet */
  err = cas_own_record(st, vol->place, &vol->page);
  if (!err && name) err = cas_stage_pulled(st, vol, name, &vol);
  if (err || !tree || *cas_digests(vol)) return err; /* or it is by now */
  memcpy(vol->then.cid, tree->now.cid, CAS_DIGEST_LEN);
  cas_stage_edge(vol, cas_digests(vol), *cas_root(tree));
  return 0;
}

/* Ends what is staged: it holds from now on (is_durable), or never was.  Nobody
 * sees a part of it, as the lock is not let go before all of it is done.  Only
 * then it frees what is gone, which takes time: volumes without an id that
 * nobody uses, be it that they were removed, or hidden and given up, or staged
 * and taken back; and what edges led to before.  (unlocks) */
static void cas_settle(struct nbdserve_cas *st, int is_durable) {
  for (uint32_t i = 0; i < st->nvolumes; i++) {
    struct cas_volume *vol = st->volumes[i];
    if (!vol->is_staged) continue;
    assert(vol->page && vol->id);
    /* Clients read `now` without the lock: it is written only if it changes. */
    if (is_durable && memcmp(&vol->now, &vol->then, sizeof vol->now) != 0)
      vol->now = vol->then;
    vol->then = vol->now;
    vol->is_staged = 0;
    if (vol->edge && !is_durable) {
      struct cas_node *taken_back = *vol->edge;
      *vol->edge = vol->was;
      vol->was = taken_back;
    }
    vol->edge = NULL;
  }
  os_wake_all(&st->lock);
  /* From the end: only who holds ckpt takes one out, others may add some. */
  for (uint32_t i = st->nvolumes; i-- > 0;) {
    struct cas_volume *vol = st->volumes[i];
    struct cas_node *gone[] = {vol->was, *cas_root(vol), *cas_digests(vol)};
    int is_gone = !vol->now.id && !vol->clients; /* with its maps */
    vol->was = NULL;
    if (is_gone) {
      assert(!vol->pins && !vol->is_staged);
      *cas_root(vol) = *cas_digests(vol) = NULL;
      st->by_place[vol->place] = NULL;
      for (uint32_t k = i + 1; k < st->nvolumes; k++)
        st->volumes[k - 1] = st->volumes[k];
      st->nvolumes--;
      NBDSERVE_FREE(vol);
    }
    for (int k = 0; k < (is_gone ? 3 : 1); k++)
      cas_unref(st, gone[k]);
  }
}

/* ---- Checkpoints ----------------------------------------------------------
 * The cut, under the lock, gives every dirty node a pair of slots and encodes
 * all pages but those of leaves, in memory.  From then on nothing is dirty.
 * Leaves are copied later, in portions, as they are then: if one has changed,
 * the log tells it once more.  Nodes are freed only by who holds ckpt, so none
 * of them vanishes meanwhile.
 *
 *   under the lock        the lock is let go in between     under the lock
 *   cas_make_cut          cas_write_pages, cas_sync,        cas_end_cut,
 *                         cas_write_super, cas_sync, twice  cas_settle
 *
 *   nodes get slots,  ->  pages are written to both of  ->  slots that nothing
 *   the log begins a      their slots, then one super-      names any more are
 *   page, `retired`       block and the other one           free; so is the log
 *   is set aside                                            before the cut
 *
 * What clients change meanwhile makes nodes dirty again, and is in log pages
 * from the cut's on, so it belongs to the next checkpoint.  The slots that it
 * retires are named by the superblock of this one; they wait for the next one,
 * too. */

/* A page that a checkpoint writes */
struct cas_write {
  struct cas_node *node;
  uint32_t slot;       /* the first of its pair; the node has lost it when it
                          has become dirty again */
  unsigned char *page; /* as it was at the cut; NULL: a leaf */
};

/* What a cut has made */
struct cas_cut {
  struct cas_write *writes; /* [n]; room for all that was dirty */
  uint32_t n;
  uint32_t retired; /* list of slots that are free when it is durable */
  struct cas_super super;
};

/* Encodes a node as a page of the checkpoint that is being made; a leaf has to
 * be in memory.  Records are those that hold when it is durable. */
static void cas_encode_node(const struct nbdserve_cas *st,
                            const struct cas_node *node, unsigned char *p) {
  struct cas_head head = cas_head_of(st, node);
  int has_records = node->level == CAS_LEVELS;
  uint32_t first = node->index * st->per_page; /* the place of a record */
  head.number = st->last_number;
  assert(node->level || node->slots);
  memset(p, 0, st->bs);
  cas_encode(cas_head_sizes, &head, p);
  p += CAS_HEAD;
  for (uint32_t c = 0; !has_records && c < node->nkids; c++)
    if (node->kid[c]) u_put32(p + 4 * c, node->kid[c]->slot);
  for (uint32_t c = 0; node->slots && c < st->fanout; c++)
    u_put32(p + 4 * c, node->slots[c]);
  for (uint32_t c = 0; has_records && c < st->per_page; c++, p += CAS_RECORD) {
    const struct cas_volume *vol =
        first + c < st->places ? st->by_place[first + c] : NULL;
    if (!vol || !vol->then.id) continue;
    struct cas_record record = vol->then;
    const struct cas_node *root = *cas_root(vol);
    const struct cas_node *digests = *cas_digests(vol);
    record.root = root ? root->slot : 0;
    record.digests = digests ? digests->slot : 0;
    assert(vol->page == node && record.id == vol->id);
    assert((!root || root->slot) && (!digests || digests->slot));
    assert(cas_is_name(record.name) != (record.flags == CAS_IS_PARTIAL));
    assert((record.flags == CAS_IS_SNAPSHOT) == (vol->parent != NULL));
    cas_encode(cas_record_sizes, &record, p);
  }
}

/* Does a node have nothing below it?  A page of the catalog has volumes, also
 * those that have no maps. */
static int cas_is_empty(struct nbdserve_cas *st, const struct cas_node *node) {
  for (uint32_t c = 0; c < node->nkids; c++)
    if (node->kid[c]) return 0;
  for (uint32_t i = 0; node->level == CAS_LEVELS && i < st->nvolumes; i++)
    if (st->volumes[i]->page == node) return 0;
  return node->level ||
         u_is_zero((const unsigned char *)node->slots, st->fanout * 4);
}

/* Adds what is dirty from *at on down to a cut; what is empty goes.  Below a
 * node that is clean nothing is dirty.  Kids come before their parent, so that
 * the page of the parent can name their slots.  A node that is shared stays
 * when it is empty: other edges lead to it. */
static int cas_cut_below(struct nbdserve_cas *st, struct cas_cut *cut,
                         struct cas_node **at) {
  struct cas_node *node = *at;
  struct cas_write write = {.node = node};
  if (!node || node->slot) return 0;
  for (uint32_t c = 0; c < node->nkids; c++) {
    int err = cas_cut_below(st, cut, &node->kid[c]);
    if (err) return err;
  }
  if (node->refs == 1 && cas_is_empty(st, node)) {
    cas_forget_leaf(st, node);
    NBDSERVE_FREE(node->kid);
    NBDSERVE_FREE(node);
    st->ndirty--;
    *at = NULL;
    return 0;
  }
  if (node->level) {
    write.page = NBDSERVE_MALLOC(st->bs);
    if (!write.page) return -ENOMEM;
    cas_encode_node(st, node, write.page);
  }
  write.slot = node->slot = cas_take_pair(st);
  assert(CAS_AT(st, node->slot, refs) == 1 && st->ndirty > 0);
  node->is_given = 1;
  cut->writes[cut->n++] = write;
  st->ndirty--;
  return 0;
}

/* Makes a cut, with a change if there is one.  First, while syncs may let the
 * lock go, it sees to it that there are pairs for all that is dirty; nothing
 * has changed if that fails.  It must not make a checkpoint for that, as it is
 * a part of one: that is why cas_apply does so, and why it is no cas_get_pairs.
 * From the allocation on it does not let the lock go: what cas_cut_below finds
 * dirty is what was counted. (unlocks) */
static int cas_make_cut(struct nbdserve_cas *st, struct cas_change *change,
                        struct cas_cut *cut) {
  int err = st->failed;
  if (!err && change) err = cas_stage(st, change);
  if (err) return err;
  while ((err = cas_want_pairs(st, change ? change->kept : 0)) == -ENOSPC &&
         (st->dropped || st->npending))
    cas_sync(st, 1);
  if (err) return err;
  cut->writes = NBDSERVE_MALLOC((st->ndirty + 1) * sizeof *cut->writes);
  if (!cut->writes) return -ENOMEM;
  cas_log_close(st); /* (C13) */
  cut->retired = st->retired;
  st->retired = 0;
  cut->super = st->super;
  cut->super.number = ++st->last_number;
  err = cas_cut_below(st, cut, &st->catalog);
  cut->super.replay = st->seq;
  cut->super.nslots = st->nslots;
  cut->super.next_id = st->next_id;
  cut->super.ro_compat = 0;
  for (uint32_t i = 0; i < st->nvolumes; i++)
    if (st->volumes[i]->then.id && st->volumes[i]->then.flags == CAS_IS_PARTIAL)
      cut->super.ro_compat = CAS_HAS_PARTIAL;
  cut->super.catalog = st->catalog ? st->catalog->slot : 0;
  return err ? err : st->failed;
}

/* Writes the pages of a cut, each to both of its slots (C17), a portion at a
 * time: leaves are encoded under the lock, and hashed and written without it.
 * The first copies of a portion are written before the second ones, so that
 * they lie in a row.  (unlocks) */
static int cas_write_pages(struct nbdserve_cas *st, struct cas_cut *cut) {
  unsigned char *pages = NBDSERVE_MALLOC(CAS_PORTION * (size_t)st->bs);
  struct cas_block blk[CAS_PORTION];
  int err = pages ? 0 : -ENOMEM;
  for (uint32_t first = 0; first < cut->n && !err; first += CAS_PORTION) {
    uint32_t n = (uint32_t)u_min(cut->n - first, CAS_PORTION);
    for (uint32_t i = 0; i < n; i++) {
      const struct cas_write *write = cut->writes + first + i;
      blk[i] = (struct cas_block){.slot = write->slot, .todo = CAS_BOTH};
      blk[i].data = write->page ? write->page : pages + (size_t)i * st->bs;
      if (!write->page) cas_encode_node(st, write->node, blk[i].data);
    }
    cas_unlock(st);
    for (uint32_t i = 0; i < n; i++)
      cas_sum_page(st->hw, blk[i].data, st->bs, blk[i].sum);
    for (int copy = 0; copy < 2; copy++) {
      cas_move_both(st, blk, n, OS_WRITE);
      for (uint32_t i = 0; i < n; i++) {
        if (blk[i].err) err = blk[i].err; /* then the other one is left out */
        blk[i].slot += CAS_TWIN;
      }
    }
    os_lock(&st->lock);
  }
  NBDSERVE_FREE(pages);
  return err;
}

/* Writes a superblock to its first or second place.  Its 512 bytes have their
 * own SHA-256; the rest of the place is zeroes. */
static int cas_write_super(struct nbdserve_cas *st,
                           const struct cas_super *super, int place) {
  unsigned char p[CAS_PAGE] = {0};
  assert(place < 2 && super->number >= st->super.number);
  assert(super->nslots && super->nslots % CAS_SEGMENT == 0);
  cas_encode(cas_super_sizes, super, p);
  sha_256(st->hw, p, NULL, CAS_SUPER_SUM, p + CAS_SUPER_SUM, NULL);
  return cas_io(st, OS_WRITE, p, sizeof p, (uint64_t)place * CAS_UNIT);
}

/* Ends a cut.  When it is durable, what the superblock before named is free.
 * Else it is taken back: what it made clean is dirty again, and its slots,
 * which nothing durable names, are free; that of a node that has changed since
 * is retired already, and waits. (unlocks) */
static void cas_end_cut(struct nbdserve_cas *st, struct cas_cut *cut,
                        int is_durable) {
  uint32_t unused = 0;
  if (is_durable) st->super = cut->super;
  for (uint32_t i = 0; i < cut->n; i++) {
    struct cas_node *node = cut->writes[i].node;
    assert(node->is_given && cut->writes[i].slot);
    node->is_given = 0;
    if (!is_durable && node->slot == cut->writes[i].slot)
      cas_make_dirty(st, node, &unused); /* else it has changed since */
    NBDSERVE_FREE(cut->writes[i].page);
  }
  NBDSERVE_FREE(cut->writes);
  cas_free_list(st, is_durable ? cut->retired : unused); /* (C6) */
  if (is_durable) {
    cas_change_space(st, SPACE_FULL, SPACE_UNKNOWN); /* as after a sync */
    return;
  }
  /* What was retired before the cut is still named by the superblock, and waits
   * for the next one, with what was retired since. */
  uint32_t *end = &cut->retired;
  while (*end)
    end = &CAS_AT(st, *end, link);
  *end = st->retired;
  st->retired = cut->retired;
}

/* Writes all that is dirty, with a change of the catalog if there is one, so
 * that the log up to now is not needed any more.  The order (C7): the pages;
 * the first superblock, while the second is still the old one; the second one,
 * before anything is free or answered.  If memory, space
 * or a page write fails, the cut is taken back, and the volumes are as before;
 * after a page write it is tried again in other segments.  If a sync or a
 * superblock fails, nobody knows what is in the file, so the store fails
 * (C14).  since: the
 * number of the superblock that the caller has seen: if there is a newer one by
 * now, somebody else has done it; UINT64_MAX: a checkpoint in any case. */
static int cas_checkpoint(struct nbdserve_cas *st, struct cas_change *change,
                          uint64_t since) {
  int err = 0;
  os_lock(&st->ckpt);
  os_lock(&st->lock);
  for (int tries = 1; st->super.number <= since; tries++) {
    struct cas_cut cut = {.n = 0};
    err = cas_make_cut(st, change, &cut);
    if (!err) err = cas_write_pages(st, &cut);
    if (!err) err = cas_sync(st, 1);
    for (int place = 0; place < 2 && !err; place++) {
      assert(cut.super.number > st->super.number);
      assert(cut.super.replay <= st->seq && cut.super.replay <= st->durable);
      err = cas_write_super(st, &cut.super, place);
      cas_fail(st, err);
      if (!err) err = cas_sync(st, 1);
    }
    cas_end_cut(st, &cut, !err);
    cas_settle(st, !err);
    /* Once more, if it was pages that could not be written: the segments where
     * they were are passed over now (C19).  But not for ever: the next ones may
     * be no better, and are new space each time. */
    if (!err || err == -ENOMEM || !cut.n || st->failed) break;
    if (tries == CAS_TRIES) break;
  }
  cas_unlock(st);
  os_unlock(&st->ckpt);
  return err;
}

/* Makes a checkpoint, or leaves it at one that another thread has made
 * meanwhile.  (unlocks) */
static int cas_checkpoint_meanwhile(struct nbdserve_cas *st) {
  uint64_t number = st->super.number;
  cas_unlock(st);
  int err = cas_checkpoint(st, NULL, number);
  os_lock(&st->lock);
  return err;
}

/* Makes a change of the catalog.  If there is no space for it, a checkpoint
 * without it frees the retired slots, and the change is tried once more. */
static int cas_apply(struct nbdserve_cas *st, struct cas_change *change) {
  int err = cas_checkpoint(st, change, UINT64_MAX);
  if (err != -ENOSPC || cas_checkpoint(st, NULL, UINT64_MAX)) return err;
  return cas_checkpoint(st, change, UINT64_MAX);
}

/* What is to be done beside requests */
enum cas_job {
  JOB_NONE,
  JOB_CHECKPOINT,
  JOB_FILL_INDEX,
  JOB_MARK /* say in the log that all of it is durable, if that stays so */
};

/* The next of these.  A checkpoint is due when half of the log is used, so that
 * it is done before the log is full and writers have to wait; when so much is
 * dirty that it takes long; and when slots wait that it would free, where there
 * are many or pairs are few. */
static enum cas_job cas_next_job(const struct nbdserve_cas *st) {
  if (st->failed || st->readonly || st->closing) return JOB_NONE;
  if (st->seq - st->super.replay > st->super.log_pages / 2 ||
      st->ndirty > CAS_MAX_DIRTY || st->nwaiting > CAS_WAITING ||
      (st->retired &&
       st->npairs + st->npending < st->ndirty + CAS_RESERVE_PAIRS))
    return JOB_CHECKPOINT;
  if (st->filled < st->to_fill) return JOB_FILL_INDEX;
  if (st->marked < st->durable && st->durable == st->seq && !st->nlog)
    return JOB_MARK;
  return JOB_NONE;
}

/* Enters some slots into the index, by the digests in the file, after the store
 * was opened: that takes time, so requests come in between.  A digest may be
 * wrong, or the slot may be written meanwhile: a hit is only a hint (C12).
 * What is in the index, or holds a page, has a tag, and is left alone (C11). */
static void cas_fill_index(struct nbdserve_cas *st) {
  unsigned char digest[CAS_FILL][CAS_DIGEST_LEN];
  uint32_t first = st->filled;
  assert(first < st->to_fill && first % CAS_FILL == 0);
  st->filled += CAS_FILL;
  if (cas_io(st, OS_READ, digest, sizeof digest, cas_digest_off(st, first)))
    return; /* what is not found is stored twice */
  for (uint32_t i = first ? 0 : 1; i < CAS_FILL; i++) {
    uint32_t slot = first + i;
    int is_free = CAS_AT(st, slot, refs) <= 0;
    if (is_free || CAS_AT(st, slot, tag) & ~CAS_GOOD) continue;
    if (!u_is_zero(digest[i], CAS_DIGEST_LEN))
      cas_index(st, slot, CAS_TAG(digest[i]));
  }
}

/* The thread beside requests.  It ends when there is nothing to do.  When a
 * second has passed without a request, it writes a log page without entries,
 * which says that all before it is durable, so that nobody takes damage there
 * for a torn end (C22).  What is logged next fills the same page. */
static void *cas_work(void *arg) {
  struct nbdserve_cas *st = arg;
  enum cas_job job;
  int err = 0;
  os_lock(&st->lock);
  while (!err && (job = cas_next_job(st)) != JOB_NONE) {
    uint64_t seq = st->seq;
    if (job == JOB_MARK && st->is_borrowed) break; /* it cannot wait */
    assert(st->busy && !st->readonly);
    if (job == JOB_CHECKPOINT) err = cas_checkpoint_meanwhile(st);
    if (job == JOB_FILL_INDEX) cas_fill_index(st);
    if (job == JOB_MARK) os_wait_ms(&st->lock, CAS_IDLE_MS);
    if (job == JOB_MARK && st->seq == seq && !st->nlog && !st->closing &&
        !st->syncing)
      cas_log_write(st);
    cas_yield(st);
  }
  st->busy = st->is_borrowed = 0;
  os_wake_all(&st->lock);
  cas_unlock(st);
  return NULL;
}

/* Starts cas_work if there is something to do and it does not run. */
static void cas_kick(struct nbdserve_cas *st) {
  os_lock(&st->lock);
  enum cas_job job = cas_next_job(st);
  int starts = !st->busy && job != JOB_NONE;
  if (starts) st->busy = 1;
  if (job == JOB_CHECKPOINT) os_wake_all(&st->lock); /* it may be idle */
  cas_unlock(st);
  if (!starts || os_thread(cas_work, st) == 0) return;
  st->is_borrowed = 1; /* without a thread for it, ours does the work */
  cas_work(st);
}

/* ---- Requests ---------------------------------------------------------------
 * A WRITE goes through steps, each for all blocks of the request or batch:
 *
 *   hash        no lock
 *   choose      under the lock: a slot that may hold the same, or a free one
 *   store       no lock: data and digests are written, duplicates compared
 *   commit      under the lock: map, log; then the log page is written
 *
 * Between choose and commit the block's slot is held, so nobody takes it; the
 * map is looked at only in commit, so two writers of the same block are in some
 * order, and the later one wins.  A part of a block is read, changed and put;
 * `expected` makes commit refuse it if the block has changed meanwhile, and
 * then it is done again.
 *
 * A READ pins the slots under the lock, reads without it, and takes the pins
 * away: while there are pins nobody writes to these slots, whatever becomes of
 * the block in between.
 *
 * Errors are those of single blocks, and a request gets the one of its last bad
 * block:
 *
 *   -ENOSPC    no slot, or no pairs for the nodes that get dirty
 *   -EIO       the medium, what is lost, or a store that has failed (C14)
 *   -EUCLEAN   the data is not what its digest says; the client gets EIO
 *   -EAGAIN    OS_READ_NOW: not in memory; commit: not what was expected
 *   -EBADMSG   a pulled block is not what its digest in the tree says */

/* Frees slots that only wait for something: by a sync, if dropped data or new
 * space waits for one; else by a checkpoint, if retired pages wait for that.
 * Returns whether something may be free now, so that the caller tries again.
 * (unlocks) */
static int cas_reclaim(struct nbdserve_cas *st) {
  if (st->failed) return 0;
  if (st->dropped || st->npending) return !cas_sync(st, 1);
  return st->retired && !cas_checkpoint_meanwhile(st);
}

/* Sees to it that there are free pairs for all that is dirty, and more, of
 * which some may have to be reclaimed.  (unlocks) */
static int cas_get_pairs(struct nbdserve_cas *st, uint32_t more) {
  int err;
  do
    err = cas_want_pairs(st, more);
  while (err == -ENOSPC && cas_reclaim(st));
  return st->failed ? st->failed : err;
}

/* Finds a block in a map, and sees to it that its slot can be changed: there is
 * room for an entry in the log, whose last quarter is for pages that are not
 * full, and there are pairs for the nodes that get dirty. (unlocks, but not
 * after the last look at any of these) */
static int cas_prepare(struct cas_volume *vol, uint64_t block,
                       struct cas_spot *spot) {
  struct nbdserve_cas *st = vol->st;
  for (;;) {
    int err = cas_find_spot(st, cas_root(vol), block, spot);
    if (err || st->is_replaying) return err;
    uint32_t kept = spot->gives_back ? CAS_FOR_RM : CAS_RESERVE_PAIRS;
    int is_full = st->seq - st->super.replay >= st->super.log_pages / 4 * 3;
    err = is_full ? cas_checkpoint_meanwhile(st)
                  : cas_want_pairs(st, kept + CAS_MARGIN);
    if (is_full && !err) continue;
    if (is_full || !err || !cas_reclaim(st)) return err;
  }
}

/* Chooses a slot for a block, which gets a hold on it: the nth, from 0 on,
 * that the index has for its digest, or a free one, which enters the index at
 * once: others may find it before it is written, and compare, in vain.
 * todo: what is to be written, of a free one; else nothing. */
static int cas_choose(struct nbdserve_cas *st, struct cas_block *blk, int nth) {
  assert(blk->is_wanting);
  blk->slot = nth < CAS_CANDIDATES ? cas_lookup(st, blk->sum, nth) : 0;
  blk->todo = blk->slot ? 0 : CAS_BOTH;
  cas_hold(st, blk->slot); /* if it is one of the index */
  int err = blk->slot ? 0 : cas_take_slot(st, &blk->slot);
  if (err) return err;
  if (blk->todo) cas_index(st, blk->slot, CAS_TAG(blk->sum));
  blk->is_trusted = (CAS_AT(st, blk->slot, tag) & CAS_GOOD) != 0;
  return 0;
}

/* Has the slot of a block, which the index has found, the same data, and a
 * digest that fits?  A hit is only a hint (C12).  The digest of a slot that was
 * read or written since the store was opened is known to fit; of others it is
 * read, too: a block must not come to lie where the digest is damaged. */
static int cas_is_same(struct nbdserve_cas *st, const struct cas_block *blk) {
  struct cas_block has = {.slot = blk->slot,
                          .data = NBDSERVE_MALLOC(st->bs),
                          .todo = blk->is_trusted ? CAS_DATA : CAS_BOTH};
  memcpy(has.digest, blk->sum, CAS_DIGEST_LEN); /* unless it is read */
  if (has.data) cas_move_both(st, &has, 1, OS_READ);
  int is_same = has.data && !has.err && !has.digest_err &&
                memcmp(has.data, blk->data, st->bs) == 0 &&
                memcmp(has.digest, blk->sum, CAS_DIGEST_LEN) == 0;
  NBDSERVE_FREE(has.data);
  return is_same;
}

/* Gives slots to the blocks that want one, and holds on them.  The first rounds
 * try what the index knows; what cannot be written in one place is written to
 * another, as cas_move has seen to it that the segment is passed over.  Blocks
 * that still want one at the end have an error, and maybe a slot: with the
 * hold. */
static void cas_place_blocks(struct nbdserve_cas *st, struct cas_block *blk,
                             size_t n) {
  int is_over = 0;
  for (int round = 0; round < CAS_TRIES && !is_over; round++) {
    os_lock(&st->lock);
    for (size_t i = 0; i < n; i++) {
      if (!blk[i].is_wanting) continue;
      cas_drop(st, blk[i].slot, &st->dropped); /* of the round before */
      do
        blk[i].err = cas_choose(st, blk + i, round);
      while (blk[i].err == -ENOSPC && cas_reclaim(st));
    }
    cas_unlock(st);
    cas_move_both(st, blk, n, OS_WRITE);
    is_over = 1;
    for (size_t i = 0; i < n; i++) {
      if (!blk[i].is_wanting || !blk[i].slot) continue;
      if (!blk[i].todo && !cas_is_same(st, blk + i)) blk[i].err = -EIO;
      blk[i].is_wanting = blk[i].err != 0;
      blk[i].todo = 0;
      is_over &= !blk[i].is_wanting;
    }
  }
}

/* Enters a block that has its slot into the map and the log.  The hold passes
 * to the map; if it does not, it stays the block's.  Between the last look at
 * the map and the entry in the log the lock is not let go: so the log has the
 * changes of a block in the order in which the map has had them. (unlocks) */
static int cas_commit_block(struct cas_volume *vol, struct cas_block *blk) {
  struct nbdserve_cas *st = vol->st;
  struct cas_spot spot;
  int err = cas_prepare(vol, blk->number, &spot);
  if (err) return err;
  if (blk->expected != CAS_ANY && blk->expected != spot.slot) return -EAGAIN;
  if (blk->slot && !st->is_replaying) CAS_AT(st, blk->slot, tag) |= CAS_GOOD;
  if (blk->slot == spot.slot) return 0; /* the same data is there already */
  err = cas_own_leaf(vol, blk->number, &spot.leaf);
  if (err) return err;
  assert(spot.leaf->slots[blk->number % st->fanout] == spot.slot);
  cas_drop(st, spot.slot, &st->dropped);
  spot.leaf->slots[blk->number % st->fanout] = blk->slot;
  cas_log(vol, blk->number, 1, blk->slot, blk->sum);
  blk->slot = 0;
  return 0;
}

/* Stores blocks.  Each gets its own error; -EAGAIN: the map does not have what
 * was expected.  The entries are in the file when the lock is let go (C3); if
 * that failed, so have all blocks: who knows what is there.  (locks) */
static void cas_put(struct cas_volume *vol, struct cas_block *blk, size_t n) {
  struct nbdserve_cas *st = vol->st;
  for (size_t i = 0; i < n; i++) {
    blk[i].slot = 0;
    blk[i].is_wanting = !u_is_zero(blk[i].data, st->bs);
    blk[i].todo = blk[i].is_wanting ? CAS_BOTH : 0;
  }
  cas_hash(st, blk, n);
  for (size_t i = 0; i < n; i++) {
    int fits = memcmp(blk[i].sum, blk[i].digest, CAS_DIGEST_LEN) == 0;
    if (!blk[i].is_known || (fits && blk[i].is_wanting)) continue;
    blk[i].is_wanting = 0;
    blk[i].err = -EBADMSG;
  }
  cas_place_blocks(st, blk, n);
  os_lock(&st->lock);
  for (size_t i = 0; i < n; i++) {
    assert(!blk[i].is_wanting || blk[i].err);
    if (!blk[i].err) blk[i].err = cas_commit_block(vol, blk + i);
    cas_drop(st, blk[i].slot, &st->dropped);
  }
  int err = cas_unlock(st);
  for (size_t i = 0; i < n && err; i++)
    blk[i].err = err;
}

/* Pins the slots of blocks and reads what is wanted of each: CAS_DATA,
 * CAS_DIGEST or 0.  Of a block that is not known to be good it reads both and
 * checks them; but if only data is wanted, not without st->verify.  Each gets
 * its own error, as from cas_fetch.  how: OS_READ or OS_READ_NOW.  todo is 0 at
 * first, and tells cas_unpin what was read in the end.  (locks) */
static void cas_read(struct cas_volume *vol, struct cas_block *blk, size_t n,
                     int want, int how) {
  struct nbdserve_cas *st = vol->st;
  int trusts = want == CAS_DATA ? !st->verify : want & CAS_UNCHECKED;
  want &= CAS_BOTH;
  struct cas_spot spot = {.slot = 0};
  os_lock(&st->lock);
  for (size_t i = 0; i < n; i++) {
    uint64_t c = blk[i].number % st->fanout;
    if (spot.leaf && c && blk[i].number == blk[i - 1].number + 1)
      spot.slot = spot.leaf->slots[c]; /* in the leaf that was just found */
    else
      blk[i].err = cas_find_spot(st, cas_root(vol), blk[i].number, &spot);
    if (!blk[i].err && spot.slot == CAS_LOST) blk[i].err = -EIO;
    blk[i].slot = blk[i].err ? 0 : spot.slot;
    assert(!blk[i].todo); /* so it stays 0, of a hole */
    int is_good = CAS_AT(st, blk[i].slot, tag) & CAS_GOOD && !st->failed;
    if (blk[i].slot) blk[i].todo = is_good || trusts ? want : CAS_BOTH;
    cas_hold(st, blk[i].slot);
  }
  cas_unlock(st);
  cas_fetch(st, blk, n, how);
  for (size_t i = 0; i < n && want == CAS_DATA; i++)
    if (!blk[i].slot && !blk[i].err) memset(blk[i].data, 0, st->bs);
}

/* Takes the pins away again.  What is bad is not used again: writing heals.
 * What was read with its digest, and fitted, is known to be good.  (locks) */
static void cas_unpin(struct nbdserve_cas *st, struct cas_block *blk,
                      size_t n) {
  os_lock(&st->lock);
  for (; n-- > 0; blk++) {
    if (!blk->slot) continue;
    if (blk->err && blk->err != -EAGAIN) cas_unindex(st, blk->slot);
    if (blk->todo == CAS_BOTH && !blk->err && !blk->digest_err)
      CAS_AT(st, blk->slot, tag) |= CAS_GOOD;
    cas_drop(st, blk->slot, &st->dropped);
  }
  cas_unlock(st);
}

/* READs, WRITEs or (buf is NULL) zeroes a part of one block.  What would not
 * change is not written: nothing is to be stored and logged for it. */
static int cas_part(struct cas_volume *vol, int is_read, unsigned char *buf,
                    uint64_t off, uint64_t len) {
  struct nbdserve_cas *st = vol->st;
  unsigned char *data = NBDSERVE_MALLOC(2 * (size_t)st->bs); /* and zeroes */
  if (!data) return -ENOMEM;
  unsigned char *part = data + off % st->bs;
  if (!buf) buf = memset(data + st->bs, 0, (size_t)len);
  int err = -EAGAIN;
  assert(len < st->bs && off % st->bs + len <= st->bs);
  while (err == -EAGAIN) {
    struct cas_block blk = {.number = off / st->bs, .data = data};
    cas_read(vol, &blk, 1, CAS_DATA, OS_READ);
    struct cas_block put = blk;
    put.expected = blk.slot; /* pinned: it stays that */
    err = blk.err == -EUCLEAN ? -EIO : blk.err;
    if (!err && is_read) {
      memcpy(buf, part, (size_t)len);
    } else if (!err && memcmp(part, buf, (size_t)len) != 0) {
      memcpy(part, buf, (size_t)len);
      cas_put(vol, &put, 1);
      err = put.err;
    }
    cas_unpin(st, &blk, 1);
  }
  NBDSERVE_FREE(data);
  return err;
}

/* READs (how: OS_READ or OS_READ_NOW) or WRITEs (OS_WRITE) the first *n blocks,
 * of several requests; then *n is 0. */
static void cas_do_blocks(struct cas_volume *vol, int how,
                          struct cas_block *blk, size_t *n) {
  if (how == OS_WRITE) {
    cas_put(vol, blk, *n);
    cas_kick(vol->st);
  } else {
    cas_read(vol, blk, *n, CAS_DATA, how);
    cas_unpin(vol->st, blk, *n);
  }
  for (; *n > 0; blk++, --*n)
    if (blk->err) blk->req->err = blk->err == -EUCLEAN ? -EIO : blk->err;
}

/* ops->run_batch: READs and WRITEs: whole blocks together, parts of blocks one
 * by one.  Requests of one type that follow each other are done as if they were
 * one; when the type changes, what was collected is done first, so that a READ
 * behind a WRITE of the same connection finds it. */
static void cas_batch(void *ctx, struct nbdserve_req *r, size_t n) {
  struct cas_volume *vol = ctx;
  struct nbdserve_cas *st = vol->st;
  struct cas_block blk[CAS_BATCH];
  size_t k = 0;
  for (const struct nbdserve_req *end = r + n; r < end; r++) {
    int reads = r->may_wait ? OS_READ : OS_READ_NOW;
    int how = r->type == NBD_CMD_WRITE ? OS_WRITE : reads;
    uint64_t len;
    assert(r->off <= vol->now.size && r->len <= vol->now.size - r->off);
    r->err = 0;
    for (uint64_t at = 0; at < r->len; at += len) { /* in the request */
      uint64_t off = r->off + at;
      int err = 0;
      len = u_min(st->bs - off % st->bs, r->len - at);
      if (len == st->bs)
        blk[k++] = (struct cas_block){.number = off / st->bs,
                                      .req = r,
                                      .data = r->buf + at,
                                      .expected = CAS_ANY};
      else
        err = cas_part(vol, r->type == NBD_CMD_READ, r->buf + at, off, len);
      if (err) r->err = err;
      if (k == CAS_BATCH) cas_do_blocks(vol, how, blk, &k);
    }
    if (!k || r + 1 == end || r[1].type != r->type)
      cas_do_blocks(vol, how, blk, &k);
  }
}

/* Makes the blocks of a volume from one on, up to `to`, holes, and logs that,
 * leaf by leaf; in between others may have the lock.  What has no leaf, as it
 * is a hole already, is passed over in one step, however large.  (unlocks) */
static int cas_make_holes(struct cas_volume *vol, uint64_t block, uint64_t to) {
  struct nbdserve_cas *st = vol->st;
  struct cas_spot spot;
  for (uint64_t end; block < to; block = end) {
    int err = cas_prepare(vol, block, &spot);
    if (err) return err;
    end = u_min(block + st->fanout - block % st->fanout, to);
    /* What is lost becomes holes, too, so that it can be read again; but behind
     * the end of the volume it is left alone, like holes. */
    int is_behind = block >= cas_blocks(st, vol->now.size);
    int has_any = !spot.leaf && spot.slot && !is_behind;
    if (!spot.leaf && !has_any) end = u_min(block + spot.span, to);
    for (uint64_t at = block; spot.leaf && at < end; at++)
      has_any |= spot.leaf->slots[at % st->fanout] != 0;
    if (has_any) { /* else nothing changes, and nothing need be logged */
      err = cas_own_leaf(vol, block, &spot.leaf);
      if (err) return err;
      assert(spot.leaf->refs == 1 && !spot.leaf->slot && spot.leaf->slots);
      for (uint64_t at = block; at < end; at++) {
        cas_drop(st, spot.leaf->slots[at % st->fanout], &st->dropped);
        spot.leaf->slots[at % st->fanout] = 0;
      }
      cas_log(vol, block, end - block, 0, NULL);
    }
    cas_yield(st);
  }
  return st->failed;
}

/* Makes the whole blocks of a range holes; blocks of which it has only a part
 * stay as they are.  (locks) */
static int cas_discard(struct cas_volume *vol, uint64_t off, uint64_t len) {
  struct nbdserve_cas *st = vol->st;
  os_lock(&st->lock);
  int err = cas_make_holes(vol, cas_blocks(st, off), (off + len) / st->bs);
  cas_unlock(st);
  cas_kick(st);
  return err;
}

/* ops->trim: a full store has no pages for it, and then it is left undone. */
static int cas_trim(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  (void)flags;
  int err = cas_discard(ctx, off, len);
  return err == -ENOSPC ? 0 : err;
}

/* ops->zero: whole blocks become holes, parts of blocks are written: the one at
 * the front (head), and, unless it is the same block, the one at the end. */
static int cas_zero(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  (void)flags;
  struct cas_volume *vol = ctx;
  uint64_t bs = vol->st->bs;
  uint64_t tail = (off + len) % bs;
  uint64_t head = u_min((bs - off % bs) % bs, len);
  int err = head ? cas_part(vol, 0, NULL, off, head) : 0;
  if (!err) err = cas_discard(vol, off, len);
  if (err || !tail || tail > len - head) return err;
  return cas_part(vol, 0, NULL, off + len - tail, tail);
}

/* ops->flush: one sync for all who wait.  It covers what any client of the
 * volume has been answered before, as that was in the file by then (C3). */
static int cas_flush(void *ctx, uint32_t flags) {
  (void)flags;
  struct nbdserve_cas *st = ((struct cas_volume *)ctx)->st;
  os_lock(&st->lock);
  int err = cas_sync(st, 0);
  cas_unlock(st);
  cas_kick(st);
  return err;
}

/* ops->close: the volume stays in the store. */
static void cas_close(void *ctx) {
  struct cas_volume *vol = ctx;
  os_lock(&vol->st->lock);
  assert(vol->clients > 0);
  vol->clients--;
  cas_unlock(vol->st);
}

/* ---- What has changed, and where data is -----------------------------------
 * Maps that share a node are the same below it, so to compare two volumes costs
 * what differs, not what there is.  Where a volume has data is the same
 * question, with a volume of zeroes as the other one: both have no nodes where
 * there are holes.
 *
 *   one volume      other volume     blocks are       known for
 *   the same node, or none in both   the same         all below that node
 *   none            a node           compared, slot   all in the leaf that are
 *   a node          another one      by slot          alike in that
 *   lost            anything         different        all that is lost
 *
 * As equal data has one slot, equal slots are equal data.  The other way round
 * it is not sure: what was stored twice counts as different. */

/* Do two maps share a node, of whatever level, above a block?  If so, *span:
 * for how many blocks from it on.  What is lost is not the same as itself. */
static int cas_is_shared(struct nbdserve_cas *st, struct cas_node **root[2],
                         uint64_t block, uint64_t *span) {
  struct cas_node *node[2] = {*root[0], *root[1]};
  uint64_t size = st->max_blocks; /* below node */
  for (int level = CAS_LEVELS; level > 0; level--) {
    *span = size - block % size;
    if (node[0] == node[1]) return !node[0] || node[0]->slot != CAS_LOST;
    size /= st->fanout;
    for (int i = 0; i < 2; i++)
      node[i] = cas_kid(node[i], block / size % st->fanout);
  }
  return 0;
}

/* Does a block, which lies in the span of both spots, have the same slot in two
 * maps?  What is lost is not the same as itself. */
static int cas_slots_are_same(struct nbdserve_cas *st,
                              const struct cas_spot spot[2], uint64_t block) {
  uint64_t c = block % st->fanout;
  uint32_t one = spot[0].leaf ? spot[0].leaf->slots[c] : spot[0].slot;
  uint32_t other = spot[1].leaf ? spot[1].leaf->slots[c] : spot[1].slot;
  return one == other && one != CAS_LOST;
}

/* Are blocks of two volumes the same, from one on?  *span: for how many that is
 * known.  1 or 0, or -EUCLEAN: a part of a map, which is the span, is lost, and
 * so not the same as anything; or another -errno: a leaf cannot be read.
 * vol[0] is NULL for a volume of zeroes, as long as the other one.
 *
 * Behind its end a volume is all zeroes; where only one ends inside a block,
 * that is not the same unless it is a hole: what is behind the end, in the same
 * block, is of no account for one and data for the other.  (locks) */
static int cas_same(struct nbdserve_cas *st, struct cas_volume *vol[2],
                    uint64_t block, uint64_t *span) {
  struct cas_node *nothing = NULL;
  struct cas_node **root[2] = {&nothing, &nothing};
  struct cas_spot spot[2] = {{.span = UINT64_MAX}, {.span = UINT64_MAX}};
  uint64_t size[2];
  uint64_t max = UINT64_MAX;
  int err = 0;
  assert(vol[1] && block < st->max_blocks);
  os_lock(&st->lock);
  for (int i = 0; i < 2; i++) {
    size[i] = vol[vol[i] ? i : 1]->now.size;
    if (vol[i] && block < cas_blocks(st, size[i])) root[i] = cas_root(vol[i]);
    if (block <= size[i] / st->bs) max = u_min(max, size[i] / st->bs - block);
  }
  int is_odd = max == 0; /* one ends here */
  if (is_odd) max = 1;
  int first = vol[0] ? 0 : 1; /* of zeroes, spot[0] says all there is to say */
  int same = !is_odd && !first && cas_is_shared(st, root, block, span);
  if (!same) {
    do /* until both leaves are in memory at once */
      for (int i = first; i < 2 && !err; i++)
        err = cas_find_spot(st, root[i], block, &spot[i]);
    while (!err && !first && cas_walk(st, *root[0], block, &spot[0]));
    /* If there is an error, that is the span of the leaf which it is about. */
    uint64_t n = u_min(u_min(spot[0].span, spot[1].span), max);
    same = !err && cas_slots_are_same(st, spot, block);
    if (is_odd && size[0] != size[1]) same &= !spot[0].slot;
    *span = err || !(spot[0].leaf || spot[1].leaf) ? n : 1;
    while (*span < n && cas_slots_are_same(st, spot, block + *span) == same)
      ++*span;
    for (int i = 0; i < 2 && !err; i++)
      if (!spot[i].leaf && spot[i].slot) err = -EUCLEAN;
  }
  cas_unlock(st);
  *span = u_min(*span, max);
  return err ? err : same;
}

/* ops->next_context: what has changed since another snapshot of the same
 * volume.  The number of a context is the id of that; so contexts come in the
 * order in which the snapshots were made. */
static uint32_t cas_next_context(void *ctx, uint32_t number, char *name) {
  const struct cas_volume *vol = ctx;
  const struct cas_volume *up = vol->parent ? vol->parent : vol;
  const struct cas_volume *other;
  os_lock(&vol->st->lock);
  do {
    other = cas_from_id(vol->st, number + UINT64_C(1));
    number = other ? other->id : 0;
  } while (other && (other == vol || other->parent != up));
  if (other) sprintf(name, "qemu:dirty-bitmap:%s", other->now.name);
  cas_unlock(vol->st);
  return number;
}

/* ops->use_context: counts a client of that snapshot in, or out again: what is
 * selected stays.  One that is staged may be about to go: then it waits. */
static int cas_use_context(void *ctx, uint32_t number, int begins) {
  struct nbdserve_cas *st = ((struct cas_volume *)ctx)->st;
  struct cas_volume *vol;
  os_lock(&st->lock);
  while ((vol = cas_by_id(st, number)) && begins && vol->is_staged)
    cas_wait(st);
  assert(vol || begins);
  if (vol) vol->clients = begins ? vol->clients + 1 : vol->clients - 1;
  cas_unlock(st);
  return vol ? 0 : -ENOENT;
}

/* ops->extents: reports what differs from a volume of zeroes as data and the
 * rest as holes; or, in the context of a snapshot, what may differ from that as
 * dirty.  -EINVAL: the context is not of this volume; a host's is not. */
static int cas_extents(void *ctx, uint64_t off, uint64_t len, uint32_t flags,
                       struct nbdserve_extents *out) {
  (void)flags;
  struct cas_volume *vol = ctx;
  struct cas_volume *both[2] = {NULL, vol};
  const struct cas_volume *up = vol->parent ? vol->parent : vol;
  uint32_t number = nbdserve_extents_context(out);
  uint64_t bs = vol->st->bs;
  uint64_t end = off + len;
  os_lock(&vol->st->lock);
  if (number) both[0] = cas_by_id(vol->st, number);
  int is_good = !number || (both[0] && both[0]->parent == up);
  cas_unlock(vol->st);
  if (!is_good) return -EINVAL;
  for (int is_enough = 0; off < end && !is_enough;) {
    uint64_t n;
    int is_same = cas_same(vol->st, both, off / bs, &n) > 0;
    uint32_t status = is_same ? NBDSERVE_EXTENT_HOLE | NBDSERVE_EXTENT_ZERO : 0;
    if (number) status = is_same ? 0 : NBDSERVE_EXTENT_DIRTY;
    uint64_t next = u_min((off / bs + n) * bs, end);
    is_enough = nbdserve_extent(out, next - off, status);
    off = next;
  }
  return 0;
}

/* ---- Opening ----------------------------------------------------------------
 *
 *   cas_open_super   the newest superblock, of which one is enough
 *   cas_load         the catalog and all maps, level by level, with all holds
 *   cas_recover      the superblocks are renewed, the log is replayed, and a
 *                    checkpoint ends it
 *
 * Nothing that is read here is trusted: every number is tested against the size
 * of the file before it is used.  Damage costs what it hits.  A page of a map
 * becomes LOST: its blocks give EIO, a write heals them.  What is worse makes
 * the store read-only until the user decides (repair).
 *
 *   what is damaged             what becomes of it
 *   one superblock              it is written anew
 *   one copy of a page          it is written anew: see cas_read_page
 *   a page of a map, both       LOST, and written so (C21)
 *   more than 8 of these, or    -EUCLEAN, until loss is accepted; a store that
 *   a page of the catalog       is only read shows what is there
 *   the volume of a snapshot    the same; the snapshot becomes a volume
 *   a slot in a leaf that       that block is lost
 *   cannot be one of data
 *
 * Level by level: all pages are known before the first leaf is looked at, so a
 * leaf that names a page as the slot of a block is found out. */

/* While a store is opened */
struct cas_loader {
  struct cas_node **nodes; /* [n]: all nodes, each before what is below it; the
                              link of a page's slot is its number here, + 1 */
  uint32_t n;
  uint32_t room;
  uint32_t nlost;       /* pages of maps that were found wrong */
  uint32_t nunreadable; /* that cannot be read; or pages of the catalog */
  uint64_t newest;      /* the highest number that a log page has */
  unsigned char *data;  /* [2] blocks */
  int older;            /* the place of the older superblock */
  int is_alike;         /* they differ in their numbers at most */
};

/* Reads the superblock in a place.  One wrong letter at its beginning is
 * damage, more are somebody else's: -EINVAL.  Unknown bits, too, make it
 * another version: -EOPNOTSUPP.  -ENOENT: zeroes, or the file ends before it;
 * -EUCLEAN: it cannot be read, or its sum is wrong. */
static int cas_read_super(struct nbdserve_cas *st, int place,
                          struct cas_super *super) {
  unsigned char p[CAS_PAGE] = {0};
  unsigned char sum[CAS_DIGEST_LEN];
  uint64_t off = (uint64_t)place * CAS_UNIT;
  int nfit = 0;
  if (off + CAS_PAGE > st->end) return -ENOENT;
  if (cas_io(st, OS_READ, p, CAS_PAGE, off) &&
      cas_io(st, OS_READ, p, CAS_SUPER_SUM + CAS_DIGEST_LEN, off))
    return -EUCLEAN; /* not even its first sector can be read */
  if (u_is_zero(p, CAS_PAGE)) return -ENOENT;
  cas_decode(cas_super_sizes, p, super);
  for (int i = 0; i < 7; i++)
    nfit += p[i] == CAS_MAGIC[i];
  if (nfit < 6) return -EINVAL;
  if (p[7] == '1' && super->version == 1) return -EOPNOTSUPP;
  sha_256(st->hw, p, NULL, CAS_SUPER_SUM, sum, NULL);
  if (memcmp(sum, p + CAS_SUPER_SUM, sizeof sum) != 0) return -EUCLEAN;
  if (super->version != CAS_VERSION || super->incompat ||
      (super->ro_compat & ~(uint64_t)CAS_HAS_PARTIAL && !st->readonly))
    return -EOPNOTSUPP;
  return 0;
}

/* Computes where everything lies, from the block size and the length of the
 * log. */
static int cas_lay_out(struct nbdserve_cas *st) {
  uint64_t end = 2 * CAS_UNIT + st->super.log_pages * CAS_PAGE;
  st->bs = (uint32_t)st->super.block_size;
  if (!u_is_power_of_2(st->bs) || st->bs < CAS_MIN_BLOCK || st->bs > 65536 ||
      st->super.log_pages < 8 || st->super.log_pages > 1 << 24)
    return -EINVAL;
  st->data_off = (end + CAS_UNIT - 1) / CAS_UNIT * CAS_UNIT;
  st->fanout = CAS_FANOUT(st->bs);
  st->per_page = (st->bs - CAS_HEAD) / CAS_RECORD;
  st->max_blocks = (uint64_t)st->fanout * st->fanout * st->fanout * st->fanout;
  return 0;
}

/* Takes what the newest superblock says.  One is enough (C8), but not if the
 * other place has another version or, unless it is only read or repaired,
 * something that is not ours. */
static int cas_open_super(struct nbdserve_cas *st) {
  struct cas_super *super = &st->super;
  struct cas_super copy[2];
  int bad[2]; /* why: -errno */
  for (int i = 0; i < 2; i++)
    bad[i] = cas_read_super(st, i, copy + i);
  if (bad[0] == -EOPNOTSUPP || bad[1] == -EOPNOTSUPP) return -EOPNOTSUPP;
  int newer = !bad[1] && (bad[0] || copy[1].number > copy[0].number);
  if (bad[newer])
    return bad[0] == -EUCLEAN || bad[1] == -EUCLEAN ? -EUCLEAN : -EINVAL;
  *super = copy[newer];
  if (cas_lay_out(st) || super->nslots < CAS_SEGMENT ||
      super->nslots % CAS_SEGMENT || super->replay > UINT64_MAX - INT32_MAX ||
      super->number > UINT64_MAX / 4 * 3)
    return -EUCLEAN;
  /* The last segment may be there in part: the rest of it was never used.  But
   * of a file that was cut short only whole segments count. */
  while (
      !cas_is_in_file(st, super->nslots - (st->is_short ? 1 : CAS_SEGMENT))) {
    super->nslots -= CAS_SEGMENT;
    st->is_short = 1;
    if (!super->nslots || !(st->readonly || st->repair)) return -EUCLEAN;
  }
  st->seq = st->durable = st->marked = super->replay;
  st->next_id = (uint32_t)super->next_id;
  st->last_number = copy[!newer].number = super->number;
  st->loader->older = !newer;
  st->loader->is_alike =
      !bad[!newer] && memcmp(copy, copy + 1, sizeof *copy) == 0;
  return bad[!newer] == -EINVAL && !st->repair && !st->readonly ? -EUCLEAN : 0;
}

/* Writes both superblocks anew (C8).  What was read may still be on its way,
 * after kill -9, and has to be durable before the other one is written: of two
 * that are under way a power cut may destroy both.  After a failed sync it may
 * be in memory only, and then nothing but a second write brings it to the
 * medium.  The older one comes first: the newer one stays whole until that is
 * durable.
 *
 * The number is raised so far that no checkpoint can have had one above it, not
 * even one that a power cut has ended: of that pages may be left. */
static int cas_renew_supers(struct nbdserve_cas *st) {
  uint64_t number = st->super.number;
  assert(!st->is_open && !st->readonly);
  st->super.number = st->last_number = number + (1 << 24);
  int err = os_datasync(st->fd);
  for (int i = 0; i < 2 && !err; i++) {
    err = cas_write_super(st, &st->super, i ^ st->loader->older);
    if (err == -ENOSPC && st->loader->is_alike) {
      /* It is full and copies what is written over: both say the same. */
      st->super.number = number;
      return 0;
    }
    if (!err) err = os_datasync(st->fd);
  }
  return err;
}

/* Adds an edge to the node whose page is in a slot, to *out.  What the page
 * says is read later.  Where no page can be, it is lost: behind the end, in the
 * second half of a segment, or where another page is that belongs elsewhere.
 * Maps that share a page share the node: it is found by its slot. */
static int cas_load_node(struct nbdserve_cas *st, uint64_t number, int level,
                         uint32_t index, struct cas_node **out) {
  struct cas_loader *loader = st->loader;
  uint32_t slot = (uint32_t)number; /* that it has in the file: 4 bytes */
  int is_slot = slot < st->nslots && slot % CAS_SEGMENT < CAS_TWIN;
  if (!slot) return 0;
  if (is_slot && CAS_AT(st, slot, tag) == TAG_PAGE) {
    assert(CAS_AT(st, slot, link) - 1 < loader->n);
    struct cas_node *node = loader->nodes[CAS_AT(st, slot, link) - 1];
    if (node->slot == slot && node->level == level && node->index == index) {
      cas_share(out, node);
      return 0;
    }
  }
  int err = cas_enlarge(&loader->nodes, &loader->room, loader->n);
  *out = cas_new_node(level, index, CAS_LOST);
  if (err || !*out) return -ENOMEM;
  loader->nodes[loader->n++] = *out;
  if (is_slot && !CAS_AT(st, slot, refs) &&
      !CAS_AT(st, slot + CAS_TWIN, refs)) {
    cas_hold_pair(st, slot);
    CAS_AT(st, slot, link) = loader->n;
    (*out)->slot = slot;
  } else if (slot != CAS_LOST) {
    loader->nlost++;
  }
  return 0;
}

/* Loads a record of the catalog: enters the volume into the list, and its two
 * maps below the page.  -EOPNOTSUPP: it is of a kind that is not known;
 * -EUCLEAN: it cannot be what any store has written. */
static int cas_load_record(struct nbdserve_cas *st, struct cas_node *page,
                           uint32_t c, const unsigned char *p) {
  struct cas_record record = {.id = 0};
  int level = CAS_LEVELS - 1;
  cas_decode(cas_record_sizes, p, &record);
  int is_partial = record.flags == CAS_IS_PARTIAL;
  if (!record.id) return 0;
  if (record.flags > CAS_IS_PARTIAL || record.levels != CAS_LEVELS)
    return -EOPNOTSUPP;
  int is_named = is_partial ? cas_is_id(record.name, CAS_PARTIAL)
                            : cas_is_name(record.name);
  if (is_partial && !(st->super.ro_compat & CAS_HAS_PARTIAL)) return -EUCLEAN;
  if (!is_named || !cas_is_size(st, record.size) || record.id >= st->next_id)
    return -EUCLEAN;
  memset(record.kept, 0, sizeof record.kept); /* as they are written */
  const struct cas_volume *vol =
      cas_add_volume(st, page, page->index * st->per_page + c, &record);
  if (!vol) return -ENOMEM;
  int err = cas_load_node(st, record.root, level, 0, cas_root(vol));
  if (err) return err;
  return cas_load_node(st, record.digests, level, 0, cas_digests(vol));
}

/* Reads the page of a node, puts what it says into the node, and adds what is
 * below to the nodes.  A page that is wrong is lost (C21): so are the blocks
 * below it, but nothing else.  Of the catalog the volumes below are left out,
 * and what led to them is made anew. */
static int cas_load_page(struct nbdserve_cas *st, struct cas_node *node) {
  struct cas_loader *loader = st->loader;
  const unsigned char *at = loader->data + CAS_HEAD;
  int is_map = node->level < CAS_LEVELS;
  int has_records = node->level == CAS_LEVELS;
  uint32_t n = has_records ? 2 * st->per_page : st->fanout; /* kids */
  int is_changed = 0;
  int err = -EUCLEAN;
  assert(node->refs > 0 && !node->nkids);
  if (node->slot == CAS_LOST && is_map) return 0;
  if (node->slot != CAS_LOST && (is_map || node->index < st->nslots))
    err = cas_read_page(st, node->slot, cas_head_of(st, node), loader->data);
  if (err) {
    uint32_t is_lost = err == -EUCLEAN && is_map;
    loader->nlost += is_lost;
    loader->nunreadable += !is_lost;
    cas_drop(st, node->slot, &st->retired);
    node->slot = is_map ? CAS_LOST : 0;
    if (!is_map) st->ndirty++;
    return 0;
  }
  if (!node->level) {
    err = cas_make_leaf(st, node, loader->data, 0);
    for (uint32_t c = 0; c < n && !err; c++) {
      cas_hold(st, node->slots[c]);
      is_changed |= node->slots[c] != u_get32(at + 4 * c);
    }
    loader->nlost += is_changed != 0; /* a block is: the page has to say so */
    if (is_changed) cas_make_dirty(st, node, &st->retired);
    return err;
  }
  while (!has_records && n > 0 && !u_get32(at + 4 * (n - 1)))
    n--;
  if (n) err = cas_enlarge(&node->kid, &node->nkids, n - 1);
  for (uint32_t c = 0; has_records && c < st->per_page && !err; c++)
    err = cas_load_record(st, node, c, at + CAS_RECORD * c);
  for (uint32_t c = 0; !has_records && c < n && !err; c++)
    err = cas_load_node(st, u_get32(at + 4 * c), node->level - 1,
                        node->index * st->fanout + c, &node->kid[c]);
  return err;
}

/* For qsort: the order of ids.  Places of the catalog are used again, so they
 * do not tell it. */
static int cas_compare_ids(const void *a, const void *b) {
  uint32_t x = (*(struct cas_volume *const *)a)->id;
  uint32_t y = (*(struct cas_volume *const *)b)->id;
  return (x > y) - (x < y);
}

/* Loads the catalog and all maps, level by level, and counts the holds on each
 * slot.  Then the volumes come into the order of their ids, which have to be
 * different, and each snapshot finds its volume.  If pages turn out to be lost,
 * what leads to them is made dirty. */
static int cas_load(struct nbdserve_cas *st) {
  struct cas_loader *loader = st->loader;
  int err = cas_load_node(st, st->super.catalog, CAS_TOP, 0, &st->catalog);
  for (uint32_t i = 0; i < loader->n && !err; i++)
    err = cas_load_page(st, loader->nodes[i]);
  if (err) return err;
  if (st->nvolumes)
    qsort(st->volumes, st->nvolumes, sizeof *st->volumes, cas_compare_ids);
  for (uint32_t i = 0; i < st->nvolumes && !err; i++) {
    struct cas_volume *vol = st->volumes[i];
    if (i && st->volumes[i - 1]->id == vol->id) return -EUCLEAN;
    if (vol->now.flags != CAS_IS_SNAPSHOT) continue;
    vol->parent = cas_by_id(st, vol->now.made_from);
    if (vol->parent && !vol->parent->now.flags) continue;
    loader->nunreadable++; /* its record is lost: a volume from now on */
    vol->parent = NULL;
    vol->now.flags = vol->then.flags = 0;
    memset(vol->now.cid, 0, CAS_DIGEST_LEN); /* it can be written */
    memset(vol->then.cid, 0, CAS_DIGEST_LEN);
    err = cas_own_record(st, vol->place, &vol->page);
  }
  if (err) return err;
  int is_bad = loader->nunreadable || loader->nlost > CAS_MAX_LOST;
  if (is_bad && !st->readonly && !st->accept_loss) return -EUCLEAN;
  st->catalog_lost = loader->nunreadable > 0;
  uint32_t n = loader->nlost || loader->nunreadable ? loader->n : 0;
  while (n-- > 0) { /* what is below comes later */
    struct cas_node *node = loader->nodes[n];
    for (uint32_t c = 0; c < node->nkids; c++) {
      const struct cas_node *kid = node->kid[c];
      if (kid && (!kid->slot || kid->slot == CAS_LOST))
        cas_make_dirty(st, node, &st->retired);
    }
  }
  return 0;
}

/* ---- Recovery: what the log says -------------------------------------------
 * What stands in the file when a store is opened may have been left by a clean
 * end, by kill -9, by a power cut, or by a failed sync. After the last of these
 * it may be in memory only, though it can be read.  So recovery goes in steps,
 * and may itself be cut off after each of them:
 *
 *   1.  Find the end of the log, and what of it is known to be durable.
 *   2.  Renew both superblocks (C8).
 *   3.  Replay the log.  What is not known to be durable is written once more,
 *      data, digests and log pages, where it stands already.
 *   4.  Sync.  From now on everything that the maps name is durable, so slots
 *      that the log has dropped are free, and others may be taken (C10).
 *   5.  Begin the log anew behind its end, and make a checkpoint.
 *
 * Until 4 no slot is taken, so what the last superblock and the log say stays
 * as it is, and a second recovery finds the same.
 *
 * Read-only nothing is written: 2, 4 and 5 are left out, and the maps are in
 * memory what they would be. */

/* Reads a log page to st->page.  Returns whether it is valid and has that
 * number; one that cannot be read is none (C9). */
static int cas_log_read(struct nbdserve_cas *st, uint64_t seq,
                        struct cas_log_head *head) {
  unsigned char *p = st->page;
  uint64_t off = cas_log_off(st, seq);
  uint32_t mixed[2][SHA_STATE_WORDS];
  unsigned char sum[CAS_DIGEST_LEN];
  assert(off + CAS_PAGE <= st->end); /* cas_open_super found slots behind it */
  if (cas_io(st, OS_READ, p, CAS_PAGE, off)) {
    st->log_unread = 1;
    return 0;
  }
  cas_decode(cas_log_sizes, p + CAS_LOG_HEAD, head);
  if (head->magic != CAS_LOG || head->count > CAS_ENTRIES) return 0;
  /* A page that is torn or rotten now may be whole when it is read next, so its
   * number must not come again, either: this counts pages with a wrong sum,
   * too.  A number as high as CAS_MAX_SEQ is taken for rot. */
  if (head->seq > st->loader->newest && head->seq < CAS_MAX_SEQ)
    st->loader->newest = head->seq;
  if (head->seq != seq) return 0;
  cas_log_sum(st, p, 0, (uint32_t)head->count, mixed, sum);
  return memcmp(sum, p + CAS_LOG_SUM, sizeof sum) == 0;
}

/* Finds the end of the log, and what of it is durable.  Pages that are not
 * valid are left out: one that was torn by a power cut, or never written, has
 * nothing that a flush has covered.  But if a later page says that it was
 * durable, that is damage, as is a page that follows a newer superblock than
 * there is (C9). */
static uint64_t cas_find_log_end(struct nbdserve_cas *st) {
  struct cas_log_head head;
  uint64_t end = st->super.replay;
  uint64_t gap = UINT64_MAX; /* the first page that is not valid */
  uint64_t past = end + st->super.log_pages;
  for (uint64_t seq = end; seq < past; seq++) {
    if (!cas_log_read(st, seq, &head)) {
      gap = u_min(gap, seq);
      continue;
    }
    if (head.super > st->super.number) st->is_outdated = 1;
    if (head.durable > gap) st->log_damaged = 1;
    if (head.durable > st->durable) st->durable = head.durable;
    end = seq + 1;
  }
  return end;
}

/* Writes anew, from the data, all digests in the same 4096 bytes as that of a
 * slot: a bad sector among them can be written only as a whole.  Only while the
 * store is opened, when nobody else writes there.  A slot whose data cannot be
 * read gets zeroes, which are the digest of nothing: reading it stays an
 * error. */
static void cas_rewrite_digests(struct nbdserve_cas *st, uint32_t slot) {
  unsigned char digests[CAS_PAGE] = {0};
  uint32_t n = CAS_DIGESTS;
  uint32_t first = slot / n * n;
  unsigned char *data = NBDSERVE_MALLOC(st->bs);
  assert(!st->is_open);
  for (uint32_t i = 0; data && i < n && cas_is_in_file(st, first + i); i++)
    if (!cas_io(st, OS_READ, data, st->bs, cas_data_off(st, first + i)))
      sha_256(st->hw, data, NULL, st->bs, digests + CAS_DIGEST_LEN * i, NULL);
  if (data)
    (void)!cas_io(st, OS_WRITE, digests, CAS_PAGE, cas_digest_off(st, first));
  NBDSERVE_FREE(data);
}

/* Does the slot of an entry have the data that the entry says?  Then it is
 * written once more, as after a failed sync it may be in memory only; if that
 * fails there still is what was read.  Where the data cannot be read the digest
 * has to do, so that a client gets an error and not what was there before.  A
 * digest that can be read, differs and cannot be written never was durable, and
 * neither was the entry: a power cut has taken back the space of both.  One
 * that cannot be read now may turn out to differ later. */
static int cas_confirm(struct nbdserve_cas *st, const struct cas_entry *entry) {
  struct cas_block blk = {.slot = (uint32_t)entry->slot,
                          .data = st->loader->data,
                          .todo = CAS_BOTH};
  assert(!st->is_open && CAS_AT(st, blk.slot, tag) != TAG_PAGE);
  cas_fetch(st, &blk, 1, OS_READ);
  int is_read = !blk.digest_err; /* else the digest was computed */
  int is_same = is_read && !memcmp(blk.digest, entry->digest, CAS_DIGEST_LEN);
  if (blk.err && blk.err != -EUCLEAN) return is_same;
  if (memcmp(blk.sum, entry->digest, CAS_DIGEST_LEN) != 0) return 0;
  if (!st->readonly) {
    (void)!cas_move_run(st, &blk, 1, CAS_DATA, OS_WRITE);
    int fails = cas_move_run(st, &blk, 1, CAS_DIGEST, OS_WRITE);
    if (fails && !is_read) cas_rewrite_digests(st, blk.slot);
    if (fails && is_read && !is_same) return 0;
  }
  CAS_AT(st, blk.slot, tag) |= CAS_GOOD;
  return 1;
}

/* Applies an entry to the maps.  One that is not known to be durable counts
 * only if the slot has the data (C9). */
static int cas_redo(struct cas_volume *vol, struct cas_entry *entry,
                    int is_known) {
  struct nbdserve_cas *st = vol->st;
  uint64_t block = entry->block;
  uint64_t end = cas_blocks(st, vol->now.size);
  uint32_t slot = (uint32_t)entry->slot;
  assert(st->is_replaying);
  if (block >= end) return 0; /* the volume became smaller after that */
  end = block + u_min(u_get64(entry->digest), end - block); /* of holes */
  if (!slot) return cas_make_holes(vol, block, end);
  /* The store may have grown after the last superblock.  A slot for which the
   * file has no room, or that holds a page by now, has lost the block. */
  int is_slot = cas_is_in_file(st, slot);
  int err = is_slot ? cas_extend(st, slot) : 0;
  is_slot = is_slot && cas_may_be_block(st, slot);
  if (err || (!is_known && (!is_slot || !cas_confirm(st, entry)))) return err;
  struct cas_block blk = {
      .number = block, .slot = is_slot ? slot : CAS_LOST, .expected = CAS_ANY};
  cas_hold(st, blk.slot);
  err = cas_commit_block(vol, &blk);
  cas_drop(st, blk.slot, &st->dropped);
  return err;
}

/* Applies a log page, after writing it once more if it may be in memory only.
 * When the store is repaired one that cannot be written applies, too: see
 * cas_recover. */
static int cas_redo_page(struct nbdserve_cas *st, uint64_t seq) {
  unsigned char *p = st->page;
  int is_known = seq < st->durable;
  struct cas_log_head head;
  int err = 0;
  if (!cas_log_read(st, seq, &head)) return 0;
  if (!is_known && !st->readonly)
    err = cas_io(st, OS_WRITE, p, CAS_PAGE, cas_log_off(st, seq));
  st->log_unwritten |= err && st->repair;
  if (st->repair) err = 0;
  for (uint32_t i = 0; i < head.count && !err; i++) {
    struct cas_entry entry;
    cas_decode(cas_entry_sizes, p + CAS_ENTRY * i, &entry);
    struct cas_volume *vol = cas_by_id(st, entry.volume);
    if (vol) err = cas_redo(vol, &entry, is_known);
  }
  return err;
}

/* Takes note, in their digests, that the free slots of a segment will be given
 * back to the file system; or, once that is durable, gives those back of which
 * it was noted.  Not where pages are, or will be (C18).  (unlocks) */
static int cas_punch(struct nbdserve_cas *st, uint32_t first, int is_noted) {
  unsigned char digest[CAS_SEGMENT][CAS_DIGEST_LEN];
  unsigned char is_free[CAS_SEGMENT + 1] = {0};
  struct cas_segment *seg = cas_segment(st, first);
  enum cas_space was = seg->space;
  uint32_t kept = st->ndirty + CAS_RESERVE_PAIRS + CAS_TWIN;
  if (seg->npages || !seg->nfree || was == SPACE_WRITTEN ||
      was == SPACE_SYNCING || was == SPACE_BUSY ||
      (was == SPACE_DURABLE && st->npairs < kept + seg->npairs))
    return 0;
  /* While the segment is BUSY nothing is taken from it, so what is free stays
   * free.  Slots that are in use may still get their data and digests from a
   * request that took them before: only those of free slots are written. */
  cas_adjust(st, first, SPACE_BUSY, 0, 0);
  for (uint32_t i = 0; i < CAS_SEGMENT; i++)
    is_free[i] = !CAS_AT(st, first + i, refs);
  cas_unlock(st);
  int err = 0;
  if (cas_io(st, OS_READ, digest, sizeof digest, cas_digest_off(st, first)))
    memset(is_free, 0, sizeof is_free); /* they stay */
  for (uint32_t i = 0; i < CAS_SEGMENT && is_noted; i++)
    is_free[i] &= !memcmp(digest[i], cas_given, CAS_DIGEST_LEN);
  /* Run by run: n slots from i on are free, and the one behind them, which may
   * be the end, is not. */
  for (uint32_t i = 0, n; i < CAS_SEGMENT && !err; i += n + 1) {
    for (n = 0; is_free[i + n]; n++)
      memcpy(digest[i + n], cas_given, CAS_DIGEST_LEN);
    if (n && is_noted)
      err = os_fallocate(st->fd, OS_PUNCH_HOLE, cas_data_off(st, first + i),
                         (uint64_t)n * st->bs);
    else if (n && cas_io(st, OS_WRITE, digest[i], n * CAS_DIGEST_LEN,
                         cas_digest_off(st, first + i)))
      break; /* what is not noted is not given back */
  }
  os_lock(&st->lock);
  assert(seg->space == SPACE_BUSY);
  /* What was durable is so no more; cas_want_pairs may give it space again, and
   * has to look here for that. */
  cas_adjust(st, first, was == SPACE_DURABLE ? SPACE_UNKNOWN : was, 0, 0);
  st->back_cursor = (uint32_t)u_min(st->back_cursor, first);
  return err;
}

/* Begins the log anew, at the place behind its end, but with numbers so high
 * that no page that was left there can fit again (C10).  It skips places that
 * cannot be written, 64 at most: the last process may have failed at one.  If
 * the log is full there is no place to try, and it begins at the first. */
static int cas_begin_log(struct nbdserve_cas *st, uint64_t end) {
  unsigned char zeroes[CAS_PAGE] = {0};
  uint64_t n = st->super.log_pages;
  uint64_t first = end + n;
  uint64_t newest = st->loader->newest;
  /* The number for the same place, a round or more later than any that was
   * seen. */
  if (newest >= end) first += (newest - end) / n * n + n;
  /* With more, a page would take a place that the replay still needs. */
  uint64_t most = u_min(st->super.replay + n - end, CAS_PORTION);
  int err = 0;
  assert(first > newest + n - 1 && first % n == end % n && most <= n);
  for (st->seq = first; st->seq < first + most; st->seq++) {
    err = cas_io(st, OS_WRITE, zeroes, CAS_PAGE, cas_log_off(st, st->seq));
    if (!err) err = os_datasync(st->fd);
    if (!err) break;
  }
  st->super.replay = st->durable = st->marked = st->seq;
  return err;
}

/* Brings the maps up to what the log says.  What was found is durable before a
 * slot is taken (C10); so what was free to the store that wrote this is free
 * now, and there is room for the checkpoint.  In a repair a page of the log
 * that could not be written again is applied all the same.  A power cut before
 * the checkpoint may still lose it, so the slots that the log has dropped are
 * not freed until the store is opened anew. */
static int cas_recover(struct nbdserve_cas *st) {
  uint64_t end = cas_find_log_end(st);
  int is_bad =
      (st->log_damaged && !st->repair) || (st->is_outdated && !st->accept_loss);
  int err = is_bad && !st->readonly ? -EUCLEAN : 0;
  if (!err && !st->readonly) err = cas_renew_supers(st);
  os_lock(&st->lock);
  st->is_replaying = 1;
  for (uint64_t seq = st->super.replay; seq < end && !err; seq++)
    err = cas_redo_page(st, seq);
  st->is_replaying = 0;
  memset(st->page, 0, CAS_PAGE);
  assert(!st->nlog && st->super.replay <= end);
  if (!err && !st->readonly && end > st->durable) err = os_datasync(st->fd);
  assert(!st->dropped);
  /* Data that the log has dropped is free: the log is durable by now.  Pages
   * that it made dirty are still named by the superblock, and wait. */
  for (uint32_t x = 1; x < st->nslots && !err && !st->log_unwritten; x++) {
    int is_page = CAS_AT(st, x, tag) == TAG_RETIRED;
    if (CAS_AT(st, x, refs) != CAS_PENDING || is_page) continue;
    CAS_AT(st, x, refs) = 0;
    cas_set_free(st, x, 1);
  }
  /* The replay may have counted in segments behind those of the superblock.
   * Where the file ends is where a power cut has left it, so they get their
   * space again; of one that gets none the digests say that it was given
   * back. */
  for (uint32_t x = (uint32_t)st->super.nslots;
       x < st->nslots && !st->readonly && !err; x += CAS_SEGMENT)
    if (cas_give_space(st, x)) cas_punch(st, x, 0);
  os_unlock(&st->lock);
  /* With nothing to write, and no page in the log that could ever be taken for
   * a new one, the log goes on as it is: to open a store that was closed costs
   * no checkpoint. */
  int is_clean = end == st->super.replay && !st->log_unread && !st->is_short &&
                 !st->ndirty && !st->repair && st->loader->newest < end;
  if (err || st->readonly || is_clean) return err;
  err = cas_begin_log(st, end);
  if (err) return err;
  st->log_damaged = 0; /* the checkpoint leaves the log behind */
  return cas_checkpoint(st, NULL, UINT64_MAX);
}

/* Frees a store; nothing is written.  The nodes go with the catalog, of which
 * all of them are below; is_ending keeps cas_unref from reading leaves and from
 * dropping slots on the way. */
static void cas_destroy(struct nbdserve_cas *st) {
  assert(!st->busy && !st->loader && !st->syncing);
  os_lock(&st->lock);
  st->is_ending = 1;
  cas_unref(st, st->catalog);
  os_unlock(&st->lock);
  while (st->nvolumes > 0)
    NBDSERVE_FREE(st->volumes[--st->nvolumes]);
  NBDSERVE_FREE(st->volumes);
  NBDSERVE_FREE(st->by_place);
  NBDSERVE_FREE(st->leaves);
  while (st->ngroups > 0)
    NBDSERVE_FREE(st->groups[--st->ngroups]);
  os_monitor_free(&st->ckpt);
  os_monitor_free(&st->lock);
  if (st->fd >= 0) close(st->fd);
  NBDSERVE_FREE(st);
}

/* Makes a store in memory, as yet without a file; NULL without memory. */
static struct nbdserve_cas *cas_new(const struct nbdserve_cas_options *o) {
  struct nbdserve_cas *st = u_zalloc(sizeof *st);
  uint32_t flags = o ? o->flags : 0;
  if (!st) return NULL;
  st->fd = -1;
  st->readonly = (flags & NBDSERVE_CAS_READONLY) != 0;
  st->accept_loss = (flags & NBDSERVE_CAS_ACCEPT_LOSS) != 0;
  st->repair = st->accept_loss || flags & NBDSERVE_CAS_REPAIR;
  st->hw = os_has_hwsha();
  st->verify = flags & NBDSERVE_CAS_VERIFY ||
               (st->hw && !(flags & NBDSERVE_CAS_NO_VERIFY));
  st->cache = (uint64_t)(o && o->cache_mib ? o->cache_mib : CAS_CACHE_MIB)
              << 20;
  os_monitor_init(&st->ckpt);
  os_monitor_init(&st->lock);
  return st;
}

/* Opens and locks the store's file.  The lock is one of the open file, so it
 * ends with the process, however that ends.  O_NONBLOCK: to open a FIFO by
 * mistake does not hang. */
static int cas_open_file(struct nbdserve_cas *st, const char *path, int flags) {
  struct stat file;
  st->fd = open(path, flags | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0666);
  if (st->fd < 0 || fstat(st->fd, &file) < 0) return -errno;
  if (!S_ISREG(file.st_mode) && !S_ISBLK(file.st_mode)) return -EINVAL;
  st->is_device = S_ISBLK(file.st_mode);
  if (st->is_device && !st->readonly && os_is_readonly_device(st->fd))
    return -EROFS;
  off_t end = lseek(st->fd, 0, SEEK_END);
  if (end < 0) return -errno;
  st->end = (uint64_t)end;
  st->can_read_now = os_can_read_now(st->fd);
  int err = os_lock_file(st->fd, st->readonly);
  if (err || !st->repair) return err;
  /* What a failed sync has left in memory is not on the medium: look there. */
  (void)!os_datasync(st->fd);
  os_advise(st->fd, POSIX_FADV_DONTNEED, 0, 0);
  return 0;
}

/* In nbdserve_cas_options.flags, for section [14] only: cas_kick is left to the
 * caller, as it starts a thread. */
#define CAS_KICK_LATER 0x80000000u

/* See nbdserve.h. */
int nbdserve_cas_open(const char *path, const struct nbdserve_cas_options *o,
                      struct nbdserve_cas **out) {
  struct cas_loader loader = {.n = 0};
  struct nbdserve_cas *st = cas_new(o);
  if (!st) return -ENOMEM;
  st->loader = &loader;
  int err = cas_open_file(st, path, st->readonly ? O_RDONLY : O_RDWR);
  if (!err) err = cas_open_super(st);
  if (!err) err = cas_extend(st, (uint32_t)st->super.nslots - 1);
  if (!err) loader.data = NBDSERVE_MALLOC(2 * (size_t)st->bs);
  if (!err && !loader.data) err = -ENOMEM;
  if (!err) err = cas_load(st);
  if (!err) err = cas_recover(st);
  NBDSERVE_FREE(loader.nodes);
  NBDSERVE_FREE(loader.data);
  st->loader = NULL;
  if (err) {
    cas_destroy(st);
    return err;
  }
  st->to_fill = st->nslots;
  st->is_open = 1;
  if (!(o && o->flags & CAS_KICK_LATER)) cas_kick(st);
  *out = st;
  return 0;
}

/* See nbdserve.h. First cas_work has to end, which is told by `closing` and may
 * be in the middle of a checkpoint.  A store that is clean needs no other. */
int nbdserve_cas_close(struct nbdserve_cas *st) {
  os_lock(&st->lock);
  st->closing = 1;
  os_wake_all(&st->lock);
  while (st->busy)
    cas_wait(st);
  int is_clean = !st->nlog && st->seq == st->super.replay;
  int err = cas_unlock(st);
  if (!err && !st->readonly && !is_clean)
    err = cas_checkpoint(st, NULL, UINT64_MAX);
  cas_destroy(st);
  return err;
}

/* Is a device all zeroes in the first and last MiB, and where the second
 * superblock comes?  That is where file systems, RAIDs and pools have their
 * labels. */
static int cas_is_unused(struct nbdserve_cas *st) {
  unsigned char *p = NBDSERVE_MALLOC(CAS_UNIT);
  const uint64_t places[] = {0, CAS_UNIT, st->end - CAS_UNIT};
  int is_unused = p && st->end >= 3 * CAS_UNIT;
  for (size_t i = 0; i < COUNT_OF(places) && is_unused; i++)
    is_unused =
        !cas_io(st, OS_READ, p, CAS_UNIT, places[i]) && u_is_zero(p, CAS_UNIT);
  NBDSERVE_FREE(p);
  return is_unused;
}

/* See nbdserve.h.  A new store is what a checkpoint makes of a superblock in
 * memory and one segment with space: two superblocks and no page at all. A file
 * that was made here goes again after an error. */
int nbdserve_cas_init(const char *path, const struct nbdserve_cas_options *o) {
  struct nbdserve_cas *st = cas_new(o);
  struct timespec t;
  if (!st) return -ENOMEM;
  clock_gettime(CLOCK_REALTIME, &t);
  st->super = (struct cas_super){
      .magic = u_get64((const unsigned char *)CAS_MAGIC),
      .version = CAS_VERSION,
      .block_size = o && o->block_size ? o->block_size : CAS_MIN_BLOCK,
      /* most likely above those of pages that lie there, and never too high */
      .number = (uint64_t)t.tv_sec % (UINT64_C(1) << 40) * 1000000,
      .log_pages = o && o->log_pages ? o->log_pages : 4096,
      .replay = 1};
  /* An id that no other store has */
  u_put64(st->super.id, (uint64_t)t.tv_sec << 30 ^ (uint64_t)t.tv_nsec);
  u_put64(st->super.id + 8, (uint64_t)getpid() << 32 ^ (uint64_t)(uintptr_t)st);
  st->seq = st->next_id = 1;
  st->last_number = st->super.number;
  int err = cas_lay_out(st);
  if (!err) err = cas_open_file(st, path, O_RDWR | O_CREAT | O_EXCL);
  int is_new = st->fd >= 0 && err != -EBUSY; /* else another one has it now */
  if (is_new) os_set_nocow(st->fd);
  if (err == -EEXIST && !cas_open_file(st, path, O_RDWR) && st->is_device &&
      cas_is_unused(st))
    err = 0; /* an unused block device will do */
  if (!err) err = cas_give_space(st, 0);
  if (!err) err = cas_checkpoint(st, NULL, UINT64_MAX); /* of nothing at all */
  if (!err) err = os_sync_new_file(st->fd, path);
  if (err && is_new) os_remove_own_file(path, st->fd);
  cas_destroy(st);
  return err;
}

/* ---- The public calls -------------------------------------------------------
 * Who uses a volume for longer than he holds the lock is its client: cas_use
 * counts him in, and cas_close out again. A volume with clients is not removed,
 * rolled back or resized (-EBUSY).
 *
 * A volume that is being filled, by an import or a seal, is hidden: it is in
 * memory and in the list, but in no record of the catalog, and nothing of it is
 * logged (C16).  So a crash leaves nothing of it but slots that nobody names.
 *
 *   cas_hide --> written as any other --> cas_apply --> cas_unhide: it stays
 *                                    \--> cas_unhide: it goes
 *
 * Whatever calls back into the host does so without a lock. */

/* All volumes and snapshots are served by these; one that is only read gets no
 * request that writes. */
static const struct nbdserve_ops cas_ops = {
    .read = ex_batched_read,
    .write = ex_batched_write,
    .flush = cas_flush,
    .trim = cas_trim,
    .zero = cas_zero,
    .extents = cas_extents,
    .close = cas_close,
    .run_batch = cas_batch,
    .hashes = 1,
    .next_context = cas_next_context,
    .use_context = cas_use_context,
};

/* Finds a volume or snapshot and counts the caller as a client.  One that a
 * checkpoint is changing is waited for. */
static int cas_use(struct nbdserve_cas *st, const char *name, size_t n,
                   struct cas_volume **vol) {
  os_lock(&st->lock);
  while ((*vol = cas_find(st, name, n, VIEW_NOW)) && (*vol)->is_staged)
    cas_wait(st);
  int err = st->failed;
  if (!err && !*vol) err = -ENOENT;
  if (!err) (*vol)->clients++;
  if (err) *vol = NULL;
  cas_unlock(st);
  return err;
}

/* Fills *out with a volume, of which the caller is a client. */
static void cas_fill_export(struct cas_volume *vol,
                            struct nbdserve_export *out) {
  assert(vol->own.run_batch == cas_batch);
  out->size = vol->now.size;
  if (out->preferred_block < vol->st->bs) out->preferred_block = vol->st->bs;
  out->flags |= NBDSERVE_EXPORT_MULTI_CONN;
  if (vol->parent || vol->st->readonly) out->flags |= NBDSERVE_EXPORT_READONLY;
  out->ops = &cas_ops;
  out->ctx = vol;
}

/* Zeroes what is behind the end of a volume: that is of no account while it is
 * there, but has to be zero when it grows, and takes space after it shrank; and
 * in a snapshot it would count for the id. */
static int cas_clear_tail(struct cas_volume *vol) {
  uint64_t bs = vol->st->bs;
  uint64_t end = u_min(vol->st->max_blocks, INT64_MAX / bs) * bs;
  uint64_t size = vol->now.size;
  return size < end ? cas_zero(vol, size, end - size, 0) : 0;
}

/* Makes ready for a change: a volume that is to grow, or of which there is to
 * be a snapshot or clone, has zeroes behind its end.  So has one that comes
 * into being in the same change, as none is resized in it. */
static int cas_prepare_op(struct nbdserve_cas *st,
                          const struct nbdserve_cas_op *op) {
  int is_snapshot = op->verb == NBDSERVE_CAS_SNAPSHOT;
  int is_resize = op->verb == NBDSERVE_CAS_RESIZE;
  size_t n = strcspn(op->name, is_snapshot ? "@" : "");
  struct cas_volume *vol;
  if (!is_snapshot && !is_resize && op->verb != NBDSERVE_CAS_CLONE) return 0;
  int err = cas_use(st, op->name, n, &vol);
  if (err) return err == -ENOENT ? 0 : err;
  if (!vol->parent) err = cas_clear_tail(vol);
  cas_close(vol); /* it may be removed in the same change */
  /* Where a block is damaged a copy still has all others. */
  return err == -EIO && !is_resize ? 0 : err;
}

/* See nbdserve.h.  The tails are cleared before the checkpoint that all changes
 * share, as that is done by ordinary writes. */
int nbdserve_cas_changes(struct nbdserve_cas *st,
                         const struct nbdserve_cas_op *ops, size_t n,
                         size_t *failed) {
  struct cas_change change = {.ops = ops, .nops = n};
  int err = st->readonly ? -EROFS : 0;
  for (size_t i = 0; i < n && !err; i++) {
    change.failed = i;
    int verb = ops[i].verb & ~NBDSERVE_CAS_DRY_RUN;
    if (n > 1 && verb == NBDSERVE_CAS_RESIZE) err = -EINVAL;
    if ((ops[i].verb ^ ops[0].verb) & NBDSERVE_CAS_DRY_RUN) err = -EINVAL;
    if (!err) err = cas_prepare_op(st, ops + i);
  }
  if (!err) err = cas_apply(st, &change);
  if (!err && n && ops->verb == NBDSERVE_CAS_RESIZE)
    (void)!cas_prepare_op(st, ops); /* what is behind the new end is free */
  if (err == -ECANCELED) err = 0;   /* a dry run has come to its end */
  if (failed) *failed = change.failed;
  return err;
}

/* See nbdserve.h. */
int nbdserve_cas_change(struct nbdserve_cas *st, int verb, const char *name,
                        const char *to, uint64_t size) {
  struct nbdserve_cas_op op = {verb, name, to, size};
  return nbdserve_cas_changes(st, &op, 1, NULL);
}

/* Makes a hidden volume, of which the caller is a client.  name: it is to have
 * that, which is reserved from now on; NULL: it is never to be seen.  Before
 * anything is written to it the index has to know what is here already. */
static int cas_hide(struct nbdserve_cas *st, const char *name, uint64_t size,
                    struct cas_volume **out) {
  if (st->readonly) return -EROFS;
  os_lock(&st->lock);
  while (st->busy && st->filled < st->to_fill)
    cas_wait(st);
  int err = cas_get_pairs(st, CAS_RESERVE_PAIRS + CAS_MARGIN);
  /* Of one that is about to go nobody knows yet whether it does. */
  if (!err && name && cas_find(st, name, strlen(name), VIEW_NOW)) err = -EEXIST;
  if (!err) err = cas_stage_new(st, NULL, NULL, name, size, out);
  if (!err) {
    (*out)->clients = 1;
    (*out)->is_staged = 0; /* it has no id in its record: nobody sees it */
    (*out)->then = (*out)->now;
  }
  cas_unlock(st);
  return err;
}

/* Ends what cas_hide has begun, or the use of a partial volume. Unless there is
 * a record that has it by now, it goes. */
static void cas_unhide(struct cas_volume *vol) {
  struct nbdserve_cas *st = vol->st;
  os_lock(&st->ckpt); /* to free its map */
  os_lock(&st->lock);
  assert(vol->clients > 0 && (vol->clients == 1 || vol->now.id));
  vol->clients--;
  cas_settle(st, 1);
  cas_unlock(st);
  os_unlock(&st->ckpt);
}

/* See nbdserve.h. */
int nbdserve_cas_begin(struct nbdserve_cas *st, const char *name, uint64_t size,
                       struct nbdserve_export *out) {
  struct cas_volume *vol;
  if (!cas_is_size(st, size)) return -EINVAL;
  int err = cas_hide(st, name, size, &vol);
  if (!err) cas_fill_export(vol, out);
  return err;
}

/* See nbdserve.h.  What was written becomes durable by the same checkpoint that
 * has the record, so there never is a volume with a part of it. */
int nbdserve_cas_finish(struct nbdserve_cas *st, struct nbdserve_export *ex,
                        int keep) {
  struct cas_volume *vol = ex->ctx;
  struct cas_change change = {.vol = vol};
  assert(!vol->now.id && vol->clients == 1);
  os_lock(&st->lock);
  vol->now.size = vol->then.size = u_min(vol->now.size, ex->size);
  cas_unlock(st);
  int err = keep ? cas_clear_tail(ex->ctx) : 0;
  if (keep && !err) err = cas_apply(st, &change);
  cas_unhide(ex->ctx);
  return err;
}

/* See nbdserve.h.  It goes on from one id to the next, and holds nothing in
 * between: ids only grow, so what comes meanwhile is listed, too. */
int nbdserve_cas_list(struct nbdserve_cas *st, nbdserve_list_fn *each,
                      void *arg) {
  char name[CAS_PATH];
  char id[72];
  uint64_t next = 0; /* id; while it is told of one volume others may go */
  int r = 0;
  os_lock(&st->lock);
  const struct cas_volume *vol;
  while (!r && (vol = cas_from_id(st, next))) {
    next = vol->id + 1u;
    struct nbdserve_cas_info info = {.name = cas_full_name(vol, name),
                                     .size = vol->now.size,
                                     .created = vol->now.created,
                                     .clients = (uint32_t)vol->clients,
                                     .readonly = vol->parent != NULL,
                                     .partial =
                                         vol->now.flags == CAS_IS_PARTIAL,
                                     .id = cas_spell_id(vol, id)};
    cas_unlock(st);
    r = each(arg, &info);
    os_lock(&st->lock);
  }
  cas_unlock(st);
  return r;
}

/* See nbdserve.h. */
void nbdserve_cas_stat(struct nbdserve_cas *st, struct nbdserve_cas_stat *out) {
  uint64_t nfree = 0;
  os_lock(&st->lock);
  for (uint32_t x = 0; x < st->nslots; x += CAS_SEGMENT)
    nfree += cas_segment(st, x)->nfree;
  *out = (struct nbdserve_cas_stat){
      .block_size = st->bs,
      .free = nfree * st->bs,
      .stored = (st->nslots - 1 - st->nwaiting - nfree) * st->bs,
      .file = (uint64_t)lseek(st->fd, 0, SEEK_END),
      .log = (st->seq - st->super.replay) * 100 / st->super.log_pages,
      .damaged = st->catalog_lost || st->log_damaged || st->is_outdated};
  cas_unlock(st);
}

/* ---- Content ids ----------------------------------------------------------
 * The tree of an id has the shape of the map: see the format.  What is sealed
 * keeps it in a map of its own, in which each level above the blocks has a
 * region. The digests of blocks, d0, are not in it: they are those of the slots
 * that the blocks are in.
 *
 *   map of the snapshot             map with its tree
 *   node of level 3                 d3, digests of the kids of this node
 *   nodes of level 2                d2, of theirs
 *   nodes of level 1                d1, digests of leaves
 *   leaves, level 0                 -, digests of blocks: in the digest area
 *
 * A snapshot that is sealed after another one, its base, begins with that one's
 * tree, and computes only what lies below nodes that they do not share.  What
 * the tree has for nodes that are holes by now is not cleared, so a digest in
 * it counts only where the map has something.
 *
 * While a tree is computed it is the data of a hidden volume (C16), which is
 * written like any other.  The checkpoint that gives the snapshot its id makes
 * the map of that volume the second one of the snapshot's record. */

/* While a snapshot is sealed */
struct cas_sealer {
  struct cas_volume *vol;  /* the snapshot, or a partial volume */
  const char *name;        /* of the snapshot that is pulled, or NULL */
  struct cas_volume *tree; /* hidden: its digests, as data */
  struct cas_volume *base; /* that it begins with, or NULL; we are a client */
  nbdserve_progress_fn *progress;
  void *arg;
};

/* How many bytes the digests of a node's kids have */
#define CAS_KIDS_LEN(st) ((size_t)(st)->fanout * CAS_DIGEST_LEN)

/* Where byte `in` of d(level) lies in a map with a tree. */
static uint64_t cas_tree_off(const struct nbdserve_cas *st, int level,
                             uint64_t in) {
  assert(level > 0 && level <= CAS_LEVELS);
  return st->max_blocks / st->fanout * st->bs * (unsigned)(level - 1) + in;
}

/* Puts the digests of n blocks, from one on, over zeroes, which stay for holes.
 * Blocks that were not read since the store was opened are checked, but not if
 * `want` is CAS_DIGEST | CAS_UNCHECKED.  Nothing may be behind the end. */
static int cas_digest_blocks(struct cas_volume *vol, int want, uint64_t first,
                             uint64_t n, unsigned char *digests) {
  struct nbdserve_cas *st = vol->st;
  struct cas_block blk[CAS_BATCH];
  unsigned char *data = NBDSERVE_MALLOC(CAS_BATCH * (size_t)st->bs);
  int err = data ? 0 : -ENOMEM;
  for (size_t k; n > 0 && !err; first += k, n -= k) {
    k = (size_t)u_min(n, CAS_BATCH);
    for (size_t i = 0; i < k; i++)
      blk[i] =
          (struct cas_block){.number = first + i, .data = data + i * st->bs};
    cas_read(vol, blk, k, want, OS_READ);
    cas_unpin(st, blk, k);
    for (size_t i = 0; i < k; i++, digests += CAS_DIGEST_LEN) {
      int is_behind = blk[i].number >= cas_blocks(st, vol->now.size);
      if (blk[i].err || (blk[i].slot && is_behind)) err = -EIO;
      if (blk[i].slot) memcpy(digests, blk[i].digest, CAS_DIGEST_LEN);
    }
  }
  NBDSERVE_FREE(data);
  return err;
}

/* Gets what digests there are for the kids of a node: of a leaf, level 0, those
 * of its blocks; of others, if has_base, those that the base's tree has; else
 * zeroes. */
static int cas_get_digests(const struct cas_sealer *sealer, int level,
                           uint32_t index, int has_base,
                           unsigned char *digests) {
  struct cas_volume *vol = sealer->vol;
  const struct nbdserve_cas *st = sealer->tree->st;
  size_t len = CAS_KIDS_LEN(st);
  uint64_t first = (uint64_t)index * st->fanout;
  memset(digests, 0, len);
  if (level > 0 && has_base)
    return ex_batched_read(sealer->tree, digests,
                           cas_tree_off(st, level, index * len), len, 0);
  if (level > 0) return 0;
  int err = cas_digest_blocks(vol, CAS_DIGEST, first, st->fanout, digests);
  uint64_t size = vol->now.size;
  uint64_t done = u_min((first + st->fanout) * st->bs, size);
  if (!err && sealer->progress && sealer->progress(sealer->arg, done, size))
    err = -ECANCELED;
  return err;
}

/* Computes the digest of a node, of which base is the counterpart in the
 * snapshot whose tree this one begins with, or NULL.  A kid that both have is
 * the same below, and its digest is in the tree already.  A snapshot's nodes do
 * not change, so no lock is held but in what reads and writes blocks. */
static int cas_seal_node(const struct cas_sealer *sealer, struct cas_node *node,
                         struct cas_node *base, unsigned char *digest) {
  const struct nbdserve_cas *st = sealer->vol->st;
  int level = node->level;
  size_t len = CAS_KIDS_LEN(st);
  unsigned char *digests = NBDSERVE_MALLOC(len);
  if (base && base->slot == CAS_LOST) base = NULL; /* who knows what it had */
  assert(!base || node->slot == CAS_LOST ||
         (base->level == level && base->index == node->index));
  int err = digests ? 0 : -ENOMEM;
  if (!err && node->slot == CAS_LOST) err = -EIO;
  if (!err) err = cas_get_digests(sealer, level, node->index, !!base, digests);
  for (uint32_t c = 0; c < st->fanout && !err; c++) {
    struct cas_node *kid = cas_kid(node, c);
    struct cas_node *same = cas_kid(base, c);
    unsigned char *at = digests + c * CAS_DIGEST_LEN;
    if (kid == same) continue;
    memset(at, 0, CAS_DIGEST_LEN);
    if (kid) err = cas_seal_node(sealer, kid, same, at);
  }
  if (!err && level > 0)
    err = ex_batched_write(sealer->tree, digests,
                           cas_tree_off(st, level, node->index * len), len, 0);
  if (!err) sha_256(st->hw, digests, NULL, len, digest, NULL);
  if (!err && u_is_zero(digests, len)) memset(digest, 0, CAS_DIGEST_LEN);
  NBDSERVE_FREE(digests);
  return err;
}

/* The tree of a volume's id as a volume of its own: see cas_root.  It is there
 * as long as the volume is. */
static struct cas_volume cas_tree_of(const struct cas_volume *vol) {
  struct cas_volume tree = *vol;
  tree.is_tree = 1;
  tree.now.size = INT64_MAX;
  return tree;
}

/* Is no page lost of a node, and of those below it? */
static int cas_is_whole(const struct cas_node *node) {
  int is_whole = !node || node->slot != CAS_LOST;
  for (uint32_t c = 0; is_whole && node && c < node->nkids; c++)
    is_whole = cas_is_whole(node->kid[c]);
  return is_whole;
}

/* Is no page lost of a volume's map, and of the tree of its id?  Else neither a
 * seal nor a pull shares anything of it: what they make is whole. */
static int cas_has_all(const struct cas_volume *vol) {
  return cas_is_whole(*cas_root(vol)) && cas_is_whole(*cas_digests(vol));
}

/* Makes ready to compute the id of a snapshot: makes a hidden volume for its
 * tree, and looks for the base, the newest sealed snapshot of the same volume
 * or of what that was made from.  One that is all zeroes has no nodes to share.
 * cas_end_seal frees what this has made, after an error, too. */
static int cas_begin_seal(struct nbdserve_cas *st, struct cas_sealer *sealer) {
  const char *name = sealer->name;
  int err = cas_hide(st, NULL, INT64_MAX, &sealer->tree);
  if (err) return err;
  os_lock(&st->lock);
  const struct cas_volume *up =
      name ? cas_find(st, name, strcspn(name, "@"), VIEW_NOW)
           : sealer->vol->parent;
  for (uint32_t i = st->nvolumes; up && !sealer->base && i-- > 0;) {
    struct cas_volume *p = st->volumes[i];
    if ((p->parent == up || p->id == up->now.made_from) && p->now.id &&
        !p->is_staged && !u_is_zero(p->now.cid, CAS_DIGEST_LEN) &&
        *cas_digests(p) && *cas_root(p) && cas_has_all(p))
      sealer->base = p;
  }
  if (sealer->base) {
    sealer->base->clients++;
    cas_share(cas_root(sealer->tree), *cas_digests(sealer->base));
  }
  cas_unlock(st);
  return 0;
}

/* Computes the content id of a volume of that size, whose top digest, d4[0], is
 * `digest`.  id may be digest. */
static void cas_compute_id(const struct nbdserve_cas *st, uint64_t size,
                           const unsigned char *digest, unsigned char *id) {
  unsigned char top[14 + 4 + 8 + CAS_DIGEST_LEN] = "nbdserve-cid-2";
  u_put32(top + 14, st->bs);
  u_put64(top + 18, size);
  memcpy(top + 26, digest, CAS_DIGEST_LEN);
  sha_256(st->hw, top, NULL, sizeof top, id, NULL);
}

/* Computes the tree of a volume in sealer->tree, and its id in the record of
 * that.  The map of the volume must be clean and not change meanwhile: it is
 * walked without the lock.  That of a snapshot never changes; of a partial
 * volume we are the only client. */
static int cas_seal_tree(struct cas_sealer *sealer) {
  unsigned char digest[CAS_DIGEST_LEN] = {0};
  struct cas_node *root = *cas_root(sealer->vol);
  struct cas_node *base = sealer->base ? *cas_root(sealer->base) : NULL;
  struct nbdserve_cas *st = sealer->vol->st;
  /* A volume of zeroes has no tree: that of the base, which it began with,
   * goes. */
  int err = root
                ? cas_seal_node(sealer, root, base, digest)
                : cas_discard(sealer->tree, 0, cas_tree_off(st, CAS_LEVELS, 0));
  cas_compute_id(st, sealer->vol->now.size, digest, sealer->tree->now.cid);
  return err;
}

/* Ends what cas_begin_seal has begun. */
static void cas_end_seal(struct cas_sealer *sealer) {
  if (sealer->base) cas_close(sealer->base);
  if (sealer->tree) cas_unhide(sealer->tree);
}

/* See nbdserve.h.  The id and the tree come to the record by a checkpoint.  If
 * somebody else has sealed the snapshot meanwhile, that holds (cas_stage), and
 * it is the same id. */
int nbdserve_cas_seal(struct nbdserve_cas *st, const char *name, char id[72],
                      nbdserve_progress_fn *progress, void *arg) {
  struct cas_sealer sealer = {.progress = progress, .arg = arg};
  struct cas_change change = {.nops = 0};
  *id = 0;
  int err = cas_use(st, name, strlen(name), &sealer.vol);
  if (err) return err;
  os_lock(&st->lock);
  cas_spell_id(sealer.vol, id);
  cas_unlock(st);
  if (!*id) {
    err = sealer.vol->parent ? cas_begin_seal(st, &sealer) : -EINVAL;
    change.vol = sealer.vol;
    change.tree = sealer.tree;
    if (!err) err = cas_seal_tree(&sealer);
    if (!err) err = cas_apply(st, &change);
    cas_end_seal(&sealer);
  }
  os_lock(&st->lock);
  if (!err) cas_spell_id(sealer.vol, id); /* from now on it is fixed */
  cas_unlock(st);
  cas_close(sealer.vol);
  return err;
}

/* ---- Checking, mending ------------------------------------------------------
 * Verify reads the superblocks and all pages, segment by segment, and then all
 * blocks, volume by volume in the order of their ids.  What a snapshot shares
 * with one that was found sound is not looked at again; what it shares with
 * others, block by block, is not read again, as CAS_GOOD says that it was.
 *
 * What can be wrong with a block, and who mends it:
 *
 *   its digest cannot be read       it is computed from the data
 *   the data does not fit it, or    another slot with the same digest, if the
 *   cannot be read                  index knows one; else a peer; else nobody
 *   a page of the map is lost       nobody: a pull of the id gets it
 *
 * Verify and repair run beside clients and changes.  They hold nothing from one
 * step to the next but the id of a volume and a block's number: a volume that
 * is removed meanwhile is passed over, one that shrinks ends earlier. */

/* See nbdserve.h. */
int nbdserve_cas_diff(struct nbdserve_cas *st, const char *a, const char *b,
                      nbdserve_range_fn *each, void *arg) {
  struct cas_volume *vol[2] = {NULL, NULL};
  uint64_t size = 0;
  uint64_t from = 0; /* the first block of the range that is being collected */
  uint64_t span;
  int err = cas_use(st, a, strlen(a), &vol[0]);
  if (!err) err = cas_use(st, b, strlen(b), &vol[1]);
  for (int i = 0; i < 2 && !err; i++)
    if (vol[i]->now.size > size) size = vol[i]->now.size;
  uint64_t blocks = cas_blocks(st, size);
  for (uint64_t block = 0; block < blocks && !err; block += span) {
    int same = cas_same(st, vol, block, &span);
    if (same < 0 && same != -EUCLEAN) err = same; /* what is lost differs */
    if (same <= 0) continue;
    if (from < block) err = each(arg, from * st->bs, (block - from) * st->bs);
    from = block + span;
  }
  if (!err && from < blocks)
    err = each(arg, from * st->bs, size - from * st->bs);
  for (int i = 0; i < 2; i++)
    if (vol[i]) cas_close(vol[i]);
  return err;
}

/* While a store is verified, or mended: where it is, and what was found */
struct cas_verifier {
  struct nbdserve_cas *st;
  nbdserve_damage_fn *each;
  nbdserve_progress_fn *progress;
  void *arg;
  int mends; /* what can be mended is written anew */
  /* Mends what is still bad of blk[0..n), with the help of the peer; or
   * NULL. */
  int (*ask)(struct cas_verifier *v, struct cas_block *blk, size_t n);
  struct nbdserve_peer *peer;
  int found;           /* something is damaged */
  int stop;            /* not 0: it ends, by this */
  char name[CAS_PATH]; /* of the volume that is being checked */
  uint32_t id;         /* what comes next: of a volume, or of one above it, */
  int is_tree;         /* its map or, behind that, the tree of its id, */
  uint64_t block;      /* and from where on */
  uint64_t done;       /* bytes */
  uint64_t total;
  unsigned char *data; /* [CAS_BATCH] blocks */
  uint64_t from;       /* of a range that is damaged, which is not told yet, */
  const char *why;     /* if this is not NULL */
  int is_sound;        /* so far nothing of this volume is damaged */
  uint32_t sound;      /* id of the last snapshot that is whole, or 0 */
};

/* Tells what is damaged, len bytes at off of a volume, or a part of the store.
 * No lock is held: the host's function may call the store, or take its time. */
static void cas_tell(struct cas_verifier *v, const char *name, uint64_t off,
                     uint64_t len, const char *why) {
  v->found = 1;
  if (!v->stop && v->each) v->stop = v->each(v->arg, name, off, len, why);
}

/* Takes note of what the volume is from off on, NULL: whole; tells a range when
 * it ends.  The tree of an id is one range, which has no place. */
static void cas_note(struct cas_verifier *v, uint64_t off, const char *why) {
  if (v->is_tree) off = 0;
  if (v->is_tree && why) why = "the tree of its id is damaged";
  if (why == v->why) return;
  if (v->why) cas_tell(v, v->name, v->from, off - v->from, v->why);
  if (why) v->is_sound = 0;
  v->from = off;
  v->why = why;
}

/* Checks the pages of a segment and, with the first one, the superblocks, and
 * mends those of which one copy is damaged.  What opening the store has found
 * counts, too.  No checkpoint runs meanwhile, so all pages were written, and
 * none is written over.  The lock of checkpoints is given back after each
 * segment, and before anybody is told: a snapshot waits for 256 pages at
 * most. */
static void cas_verify_pages(struct cas_verifier *v, uint32_t first) {
  struct nbdserve_cas *st = v->st;
  struct cas_super super;
  struct cas_head any = {.magic = 0};
  int is_short = st->readonly && st->is_short; /* repair has made do */
  int nbad = first == 0 && (st->catalog_lost || is_short);
  os_lock(&st->ckpt);
  any.number = st->super.number;
  for (int i = 0; first == 0 && i < 2; i++) {
    int err = cas_read_super(st, i, &super); /* -EINVAL: see (C8) */
    nbad += st->readonly ? err == -EINVAL
                         : err && cas_write_super(st, &st->super, i);
  }
  for (uint32_t slot = first; slot < first + CAS_TWIN; slot++) {
    os_lock(&st->lock);
    int is_page = CAS_AT(st, slot, tag) == TAG_PAGE;
    cas_unlock(st);
    nbad += is_page && cas_read_page(st, slot, any, v->data);
  }
  os_unlock(&st->ckpt);
  for (; nbad > 0; nbad--)
    cas_tell(v, "", 0, 0, "a page of a map or the catalog is damaged");
}

/* Reads the block that has a digest, from wherever the index finds it; one that
 * is to be mended may find itself first.  -ENOENT: it finds none that is
 * whole. */
static int cas_get_block(struct nbdserve_cas *st, const unsigned char *digest,
                         unsigned char *data) {
  for (int skip = 0; skip <= CAS_CANDIDATES; skip++) {
    struct cas_block blk = {.data = data, .todo = CAS_BOTH};
    os_lock(&st->lock);
    blk.slot = cas_lookup(st, digest, skip);
    cas_hold(st, blk.slot);
    cas_unlock(st);
    if (!blk.slot) break;
    cas_fetch(st, &blk, 1, OS_READ);
    os_lock(&st->lock);
    cas_drop(st, blk.slot, &st->dropped);
    cas_unlock(st);
    if ((!blk.err || blk.err == -EUCLEAN) &&
        memcmp(blk.sum, digest, CAS_DIGEST_LEN) == 0)
      return 0;
  }
  return -ENOENT;
}

/* Is the data of a block bad, while its digest, which was read, may be right?
 * Then the block is what has that digest, wherever it comes from. */
static int cas_is_bad(const struct cas_block *blk) {
  assert(!blk->err || !blk->slot || blk->todo == CAS_BOTH);
  return blk->err && blk->slot && !blk->digest_err;
}

/* Mends a block: its digest from the data, if only the digest cannot be read;
 * or the data from another slot with the same digest.  This is the one
 * exception to (C1): what durable state names gets what it should have been. */
static void cas_mend(struct nbdserve_cas *st, struct cas_block *blk) {
  assert(!st->readonly);
  if (blk->digest_err && !blk->err)
    blk->digest_err = cas_move_run(st, blk, 1, CAS_DIGEST, OS_WRITE);
  if (cas_is_bad(blk) && !cas_get_block(st, blk->digest, blk->data))
    blk->err = cas_move_run(st, blk, 1, CAS_DATA, OS_WRITE);
}

/* Takes a pin off a volume: it may go now.  A pin is what a client is, but who
 * wants to change the volume waits for it, as it is gone in a moment, and does
 * not get -EBUSY. */
static void cas_let_go(struct cas_volume *vol) {
  struct nbdserve_cas *st = vol->st;
  os_lock(&st->lock);
  vol->pins--;
  os_wake_all(&st->lock);
  cas_unlock(st);
}

/* Checks the next n blocks of a volume's map, or of the tree of its id, and
 * takes the volume's pin off once they are read: a peer may take its time.
 * From then on the blocks themselves are held (cas_unpin), so the slots stay
 * theirs even if the volume goes. */
static void cas_verify_blocks(struct cas_verifier *v, struct cas_volume *vol,
                              struct cas_volume *map, size_t n) {
  struct cas_block blk[CAS_BATCH];
  uint64_t bs = v->st->bs;
  assert(n <= CAS_BATCH);
  for (size_t i = 0; i < n; i++)
    blk[i] =
        (struct cas_block){.number = v->block + i, .data = v->data + i * bs};
  cas_read(map, blk, n, 0, OS_READ);
  cas_let_go(vol);
  for (size_t i = 0; i < n && v->mends; i++)
    cas_mend(v->st, blk + i);
  if (v->ask && !v->stop) v->stop = v->ask(v, blk, n);
  for (size_t i = 0; i < n; i++) {
    const char *why = blk[i].digest_err ? "the digest cannot be read" : NULL;
    if (blk[i].err)
      why = blk[i].slot ? "the data is not what it was"
                        : "the map cannot be read";
    if (why || !v->is_tree) cas_note(v, blk[i].number * bs, why);
  }
  cas_unpin(v->st, blk, n);
}

/* Checks the next blocks; returns 0 if there are none.  The volume is looked up
 * by its id each time: who verifies keeps nobody from removing it.  What it
 * shares with a snapshot that was found to be sound is not checked again. */
static int cas_verify_step(struct cas_verifier *v) {
  struct nbdserve_cas *st = v->st;
  struct cas_volume *vol;
  uint64_t n = 0;
  os_lock(&st->lock);
  while ((vol = cas_from_id(st, v->id)) && vol->is_staged)
    cas_wait(st);
  if (!vol) {
    cas_unlock(st);
    return 0;
  }
  /* Another volume than last time, or the beginning of one.  If the last one
   * has gone, a range of it that was damaged is of no interest any more. */
  if (vol->id != v->id || (!v->block && !v->is_tree)) {
    v->id = vol->id;
    v->is_tree = 0;
    v->block = 0;
    v->why = NULL;
    v->is_sound = 1;
  }
  uint64_t size = vol->now.size;
  uint64_t end = cas_blocks(st, size);
  if (v->is_tree)
    end =
        *cas_digests(vol) ? st->max_blocks / st->fanout * (CAS_LEVELS - 1) : 0;
  uint64_t left = end - u_min(v->block, end); /* it may be smaller now */
  int is_snapshot = vol->parent != NULL;
  struct cas_volume *sound = cas_by_id(st, v->sound);
  /* A larger snapshot has all of its blocks checked that this one has. */
  int is_known = left && sound && (v->is_tree || sound->now.size >= size);
  if (!is_known) sound = vol;
  struct cas_volume tree = cas_tree_of(vol);
  struct cas_volume *map = v->is_tree ? &tree : vol;
  struct cas_node **root[2] = {cas_root(sound), cas_root(map)};
  if (v->is_tree) root[0] = cas_digests(sound);
  is_known = is_known && cas_is_shared(st, root, v->block, &n);
  n = u_min(n, left);
  vol->pins++;
  cas_full_name(vol, v->name);
  cas_unlock(st);
  struct cas_volume *both[2] = {NULL, map}; /* where it has data */
  int same = left && !is_known ? cas_same(st, both, v->block, &n) : 1;
  if (same == 0) {
    n = u_min(n, CAS_BATCH);
    cas_verify_blocks(v, vol, map, (size_t)n);
  } else {
    const char *why = same < 0 ? "the map cannot be read" : NULL;
    cas_let_go(vol);
    if (why || !v->is_tree) cas_note(v, v->block * st->bs, why);
  }
  if (!v->is_tree) v->done += n * st->bs;
  v->block += n;
  if (n < left) return 1;
  cas_note(v, size, NULL);
  if (v->is_tree && v->is_sound && is_snapshot) v->sound = v->id;
  if (v->is_tree) v->id++;
  v->is_tree = !v->is_tree;
  v->block = 0;
  return 1;
}

/* Checks everything, and mends what it can if it is told to. Of a store that is
 * only read, blocks which were found good since it was opened are not read
 * again. */
static int cas_verify(struct cas_verifier *v) {
  struct nbdserve_cas *st = v->st;
  v->data = NBDSERVE_MALLOC(CAS_BATCH * (size_t)st->bs);
  if (!v->data) return -ENOMEM;
  if (st->log_damaged) cas_tell(v, "", 0, 0, "the log is damaged");
  os_lock(&st->lock);
  uint32_t nslots = st->nslots;
  for (uint32_t slot = 0; slot < nslots && !st->readonly; slot++)
    CAS_AT(st, slot, tag) &= ~CAS_GOOD; /* all of it is read again */
  for (uint32_t i = 0; i < st->nvolumes; i++)
    v->total += st->volumes[i]->now.size;
  cas_unlock(st);
  for (uint32_t x = 0; x < nslots && !v->stop; x += CAS_SEGMENT)
    cas_verify_pages(v, x);
  while (!v->stop && cas_verify_step(v))
    if (v->progress && v->progress(v->arg, v->done, v->total))
      v->stop = -ECANCELED;
  NBDSERVE_FREE(v->data);
  os_lock(&st->lock);
  int err = st->readonly ? 0 : cas_sync(st, 1); /* of what was mended */
  cas_unlock(st);
  if (err || v->stop) return err ? err : v->stop;
  return v->found ? -EUCLEAN : 0;
}

#if !NBDSERVE_NO_CLIENT
/* Enters an export NAME/pull or /blocks of the peer, and reads its head over
 * zeroes: the peer may be any NBD server, which must not be written to, and a
 * store may have blocks of another size. */
static int cas_enter_store(struct nbdserve_cas *st, struct nbdserve_peer *peer,
                           const char *name, const char *magic,
                           unsigned char *head) {
  struct peer_part part = {.len = CAS_PAGE, .data = head};
  int err = peer_enter(peer, name);
  if (!err && peer->size >= CAS_PAGE)
    err = peer_transfer(peer, NBD_CMD_READ, &part, 1);
  if (!err) err = peer_error(peer, &part);
  if (err) return err;
  if (memcmp(head, magic, 8) != 0 || u_get32(head + 8) != 1)
    return peer_fail(peer, -EPROTO, "the peer's %.99s is not of a store", name);
  if (u_get32(head + 12) != st->bs)
    return peer_fail(peer, -EINVAL,
                     "the peer's blocks have %" PRIu32 " bytes, not %" PRIu32,
                     u_get32(head + 12), st->bs);
  return 0;
}

/* Mends what is still bad of blk[0..n) with what the peer's store has of the
 * same digests.  They are written to its letter box, and the blocks behind it
 * read, so two round trips do for all.  What the peer does not have stays bad,
 * and what it makes up does not fit the digest.  Returns 0, or the error that
 * has ended the connection. */
static int cas_ask_peer(struct cas_verifier *v, struct cas_block *blk,
                        size_t n) {
  unsigned char digests[CAS_WANTED] = {0};
  struct peer_part ask = {CAS_PAGE, sizeof digests, digests, 0};
  struct peer_part parts[CAS_BATCH];
  struct cas_block *bad[CAS_BATCH];
  uint32_t bs = v->st->bs;
  size_t k = 0;
  for (; n > 0; blk++, n--) {
    if (!cas_is_bad(blk)) continue;
    uint64_t off = CAS_FOUND + (uint64_t)k * bs;
    memcpy(digests + k * CAS_DIGEST_LEN, blk->digest, CAS_DIGEST_LEN);
    parts[k] = (struct peer_part){off, bs, blk->data, 0};
    bad[k++] = blk;
  }
  v->peer->done = v->done;
  v->peer->total = v->total;
  int err = k ? peer_transfer(v->peer, NBD_CMD_WRITE, &ask, 1) : 0;
  if (!err && ask.err)
    err = peer_fail(v->peer, -EIO, "the peer takes no SHA-256s");
  if (!err) err = peer_transfer(v->peer, NBD_CMD_READ, parts, k);
  for (size_t i = 0; i < k && !err; i++) {
    if (parts[i].err) continue;
    blk = bad[i];
    sha_256(v->st->hw, blk->data, NULL, bs, blk->sum, NULL);
    if (memcmp(blk->sum, blk->digest, CAS_DIGEST_LEN) == 0)
      blk->err = cas_move_run(v->st, blk, 1, CAS_DATA, OS_WRITE);
  }
  return err;
}
/* Mends what it can with blocks of the store that a peer serves. */
static int cas_repair_from(struct cas_verifier v, struct nbdserve_peer *peer) {
  unsigned char head[CAS_PAGE] = {0};
  peer->progress = v.progress;
  peer->arg = v.arg;
  v.peer = peer;
  v.ask = cas_ask_peer;
  v.each = NULL;
  int err = cas_enter_store(v.st, peer, "/blocks", CAS_BLOCKS_MAGIC, head);
  if (!err && peer->size != CAS_FOUND + CAS_BATCH * (uint64_t)v.st->bs)
    err = peer_fail(peer, -EPROTO, "the peer's sizes make no sense");
  if (!err) err = cas_verify(&v);
  peer_leave(peer);
  return err == -EUCLEAN ? 0 : err;
}
#else
#define cas_repair_from(v, peer) ((void)(peer), -EOPNOTSUPP)
#endif

/* See nbdserve.h. */
int nbdserve_cas_verify(struct nbdserve_cas *st, nbdserve_damage_fn *each,
                        nbdserve_progress_fn *progress, void *arg) {
  struct cas_verifier v = {st, each, progress, arg, .mends = 0};
  return cas_verify(&v);
}

/* See nbdserve.h.  A peer mends in a first round, of which nothing is told. */
int nbdserve_cas_repair(struct nbdserve_cas *st, struct nbdserve_peer *peer,
                        nbdserve_damage_fn *each,
                        nbdserve_progress_fn *progress, void *arg) {
  struct cas_verifier v = {st, each, progress, arg, .mends = 1};
  int err = st->readonly ? -EROFS : 0;
  if (!err && peer) err = cas_repair_from(v, peer);
  return err ? err : cas_verify(&v);
}

/* Removes a partial volume that no pull has gone on with for a week: an
 * nbdserve_list_fn. */
static int cas_expire_partial(void *arg, const struct nbdserve_cas_info *info) {
  if (info->partial && info->created + CAS_WEEK < (uint64_t)time(NULL))
    (void)!nbdserve_cas_rm(arg, info->name); /* or it is in use */
  return 0;
}

/* See nbdserve.h.  Space is given back in two rounds with a sync between them:
 *
 *   1. the digests of free slots say that these are given back
 *   2. what says so durably, and is free still, is punched out of the file
 *
 * A power cut in between leaves slots that are said to have no space, and have
 * it: that costs nothing.  The other way round recovery would count on pairs
 * that are not there (C18). If there are not enough free pairs for all that may
 * have to be written, nothing is given back at all. */
int nbdserve_cas_gc(struct nbdserve_cas *st, uint64_t *bytes,
                    nbdserve_progress_fn *progress, void *arg) {
  struct nbdserve_cas_stat stat;
  int err = st->readonly ? -EROFS : 0;
  if (!err) nbdserve_cas_list(st, cas_expire_partial, st);
  if (!err) err = cas_checkpoint(st, NULL, UINT64_MAX);
  nbdserve_cas_stat(st, &stat);
  *bytes = stat.free;
  os_lock(&st->lock);
  while (st->gives_back)
    cas_wait(st);
  st->gives_back = 1;
  /* What is kept has to be known to be there before the rest is given away. */
  int may_punch = !err && !cas_get_pairs(st, CAS_RESERVE_PAIRS + CAS_TWIN);
  /* What has got space for that, and is not needed, can go when it counts. */
  for (int i = 0; i < 2 && may_punch && st->npending; i++)
    may_punch = !cas_sync(st, 1);
  for (int is_noted = 0; is_noted < 2 && may_punch && !err; is_noted++) {
    /* Only segments that the superblock counts: recovery has to give space to
     * those behind them, and would stop at one that has none. */
    for (uint32_t x = 0; x < st->super.nslots && !err; x += CAS_SEGMENT) {
      err = cas_punch(st, x, is_noted);
      cas_unlock(st);
      if (!err && progress && progress(arg, x, st->nslots)) err = -ECANCELED;
      os_lock(&st->lock);
    }
    if (!err && !is_noted) err = cas_sync(st, 1);
  }
  if (!err) err = st->failed;
  st->gives_back = 0;
  os_wake_all(&st->lock);
  cas_unlock(st);
  return err;
}

/* ---- Blocks that travel: what is served ------------------------------------
 * A store has two kinds of exports for others.  Each begins with a head; its
 * numbers are big-endian:
 *
 *   0     8 "NBDSPULL", "NBDSBLKS"   16    8 size of the snapshot, bytes
 *   8     4 version: 1               24   32 its content id
 *   12    4 block_size               56      zeroes
 *
 * NAME/pull, only to be read, is a sealed snapshot: all that another store
 * needs to make the same one of what it has already and what it lacks.  At 4096
 * the tree of the id begins: d3, then d2, d1 and d0, each from the next
 * multiple of 4096 bytes on, and only what a snapshot of that size has of them.
 * From the next multiple of 1 MiB on come the blocks.
 *
 *   0      4096                                   n * 1 MiB
 *   | head | d3 | d2 | d1        | d0             | blocks                   |
 *
 * All of it is one export, because who pulls may have one connection only, and
 * it is made while it is read: nothing of it is stored but the tree.
 *
 * /blocks is a letter box of each client's own, with zeroes for size and id.
 * Who writes SHA-256s into the 8192 bytes from 4096 on can read the blocks that
 * have them behind that, one after the other. */

/* Makes a head, over zeroes; NAME/pull adds what it has of its own. */
static void cas_put_head(const struct nbdserve_cas *st, const char *magic,
                         unsigned char *head) {
  memcpy(head, magic, 8);
  u_put32(head + 8, 1);
  u_put32(head + 12, st->bs);
}

/* The parts of NAME/pull, from the last one to the first: blocks, d0 to d3, and
 * the head */
enum {
  PART_BLOCKS,
  PART_D0,
  PART_HEAD = PART_D0 + CAS_LEVELS
};

/* Where they begin, and how long they are, in bytes.  What lies between them is
 * zeroes.  Who pulls computes it, too, from the size that the head says, and
 * believes no other offset. */
struct cas_layout {
  uint64_t at[PART_HEAD + 1];
  uint64_t len[PART_HEAD + 1];
  uint64_t end;
};

/* Lays out NAME/pull of a snapshot of so many bytes.  With a size of 0 there is
 * nothing behind the head. */
static struct cas_layout cas_pull_layout(uint64_t bs, uint64_t size) {
  uint64_t n = size / bs + (size % bs != 0);
  struct cas_layout l = {.len = {n * bs}};
  l.len[PART_HEAD] = CAS_PAGE;
  for (int k = PART_D0; k < PART_HEAD; k++) {
    l.len[k] = n * CAS_DIGEST_LEN;
    n = n / CAS_FANOUT(bs) + (n % CAS_FANOUT(bs) != 0);
  }
  for (int k = PART_HEAD; k >= 0; k--) {
    uint64_t unit = k == PART_BLOCKS ? IO_UNIT : CAS_PAGE;
    l.at[k] = (l.end + unit - 1) / unit * unit;
    l.end = l.at[k] + l.len[k];
  }
  return l;
}

/* An export NAME/pull */
struct cas_source {
  struct cas_volume *vol; /* the snapshot, of which we are a client */
  struct cas_volume data; /* views of its two maps: they have no end */
  struct cas_volume tree;
  struct cas_layout at;
  unsigned char head[CAS_PAGE];
};

/* ops->read of NAME/pull: piece by piece, each from one part of the layout.
 * Several threads may read at once; what they share is fixed.  The digests of
 * blocks are served as they stand there: who pulls checks the data.  A snapshot
 * that is all zeroes has no tree; version 0.5 left its base's there, and that
 * is not served. */
static int cas_source_read(void *ctx, void *buf, uint64_t off, uint64_t len,
                           uint32_t flags) {
  struct cas_source *source = ctx;
  const struct cas_layout *at = &source->at;
  unsigned char *p = memset(buf, 0, (size_t)len);
  int err = 0;
  (void)flags;
  for (uint64_t n; len > 0 && !err; off += n, p += n, len -= n) {
    int k = PART_HEAD;
    while (k > PART_BLOCKS && off >= at->at[k - 1])
      k--;
    uint64_t in = off - at->at[k];
    n = u_min(len, (k > PART_BLOCKS ? at->at[k - 1] : at->end) - off);
    if (in >= at->len[k]) continue; /* behind it */
    n = u_min(n, at->len[k] - in);
    if (k == PART_HEAD) {
      memcpy(p, source->head + in, (size_t)n);
    } else if (k == PART_BLOCKS) {
      err = ex_batched_read(&source->data, p, in, n, 0);
    } else if (k == PART_D0) {
      unsigned char digests[CAS_WANTED] = {0};
      uint64_t skip = in % CAS_DIGEST_LEN;
      n = u_min(n, CAS_WANTED - skip);
      err = cas_digest_blocks(
          &source->data, CAS_DIGEST | CAS_UNCHECKED, in / CAS_DIGEST_LEN,
          (skip + n + CAS_DIGEST_LEN - 1) / CAS_DIGEST_LEN, digests);
      memcpy(p, digests + skip, (size_t)n);
    } else if (*cas_root(source->vol)) {
      uint64_t in_tree = cas_tree_off(source->vol->st, k - PART_D0, in);
      err = ex_batched_read(&source->tree, p, in_tree, n, 0);
    }
  }
  return err;
}

/* ops->close of NAME/pull; also of one that could not be opened. */
static void cas_source_close(void *ctx) {
  struct cas_source *source = ctx;
  if (source->vol) cas_close(source->vol);
  NBDSERVE_FREE(source);
}

/* Opens NAME/pull; the name has n bytes.  -EOPNOTSUPP: NAME is not sealed.  As
 * long as it is open we are a client of the snapshot, so its maps stay; who
 * reads the views of them finds zeroes behind the end. */
static int cas_open_source(struct nbdserve_cas *st, const char *name, size_t n,
                           struct nbdserve_export *out) {
  static const struct nbdserve_ops ops = {.read = cas_source_read,
                                          .close = cas_source_close};
  struct cas_source *source = u_zalloc(sizeof *source);
  if (!source) return -ENOMEM;
  int err = cas_use(st, name, n, &source->vol);
  os_lock(&st->lock);
  if (!err) source->data = *source->vol;
  cas_unlock(st);
  if (!err && u_is_zero(source->data.now.cid, CAS_DIGEST_LEN))
    err = -EOPNOTSUPP;
  if (err) {
    cas_source_close(source);
    return err;
  }
  uint64_t size = source->data.now.size;
  source->data.now.size = INT64_MAX;
  source->tree = cas_tree_of(&source->data);
  source->at = cas_pull_layout(st->bs, size);
  cas_put_head(st, CAS_PULL_MAGIC, source->head);
  u_put64(source->head + 16, size);
  memcpy(source->head + 24, source->data.now.cid, CAS_DIGEST_LEN);
  out->size = source->at.end;
  out->flags |= NBDSERVE_EXPORT_READONLY | NBDSERVE_EXPORT_MULTI_CONN;
  out->ops = &ops;
  out->ctx = source;
  return 0;
}

/* An export /blocks */
struct cas_box {
  struct nbdserve_cas *st;
  unsigned char front[CAS_FOUND]; /* head and digests */
};

/* ops->read of /blocks: of blocks whole ones only. The digests are whatever the
 * client has written, so most of the time nothing may have them: that is -EIO,
 * of the request. */
static int cas_box_read(void *ctx, void *buf, uint64_t off, uint64_t len,
                        uint32_t flags) {
  struct cas_box *box = ctx;
  uint64_t bs = box->st->bs;
  unsigned char *p = buf;
  uint64_t n = off < CAS_FOUND ? u_min(len, CAS_FOUND - off) : 0;
  int err = 0;
  (void)flags;
  memcpy(p, box->front + u_min(off, CAS_FOUND), (size_t)n);
  uint64_t at = off + n - CAS_FOUND; /* in the blocks, if there is more */
  if (n < len && (at % bs || (len - n) % bs)) err = -EINVAL;
  for (; n < len && !err; n += bs, at += bs) {
    const unsigned char *digest =
        box->front + CAS_PAGE + at / bs * CAS_DIGEST_LEN;
    err = cas_get_block(box->st, digest, p + n);
  }
  return err == -ENOENT ? -EIO : err;
}

/* ops->write of /blocks: digests only.  They are this client's, and are gone
 * with it: nothing is written to the store. */
static int cas_box_write(void *ctx, const void *buf, uint64_t off, uint64_t len,
                         uint32_t flags) {
  struct cas_box *box = ctx;
  (void)flags;
  if (off < CAS_PAGE || off >= CAS_FOUND || len > CAS_FOUND - off)
    return -EINVAL;
  memcpy(box->front + off, buf, (size_t)len);
  return 0;
}

/* Opens /blocks. First the index has to know all that is there: cas_work, if it
 * is about to fill it, gets help, and a store which is only read has none. */
static int cas_open_box(struct nbdserve_cas *st, struct nbdserve_export *out) {
  static const struct nbdserve_ops ops = {
      .read = cas_box_read, .write = cas_box_write, .close = NBDSERVE_FREE};
  struct cas_box *box = u_zalloc(sizeof *box);
  if (!box) return -ENOMEM;
  box->st = st;
  cas_put_head(st, CAS_BLOCKS_MAGIC, box->front);
  os_lock(&st->lock);
  while (st->filled < st->to_fill) {
    cas_fill_index(st);
    cas_yield(st);
  }
  cas_unlock(st);
  out->size = CAS_FOUND + CAS_BATCH * (uint64_t)st->bs;
  out->flags |= NBDSERVE_EXPORT_SERIAL;
  out->ops = &ops;
  out->ctx = box;
  return 0;
}

/* See nbdserve.h. */
int nbdserve_cas_volume(struct nbdserve_cas *st, const char *name,
                        struct nbdserve_export *out) {
  struct cas_volume *vol;
  size_t n = strlen(name);
  if (strcmp(name, "/blocks") == 0) return cas_open_box(st, out);
  if (n > 5 && strcmp(name + n - 5, "/pull") == 0)
    return cas_open_source(st, name, n - 5, out);
  int err = cas_use(st, name, n, &vol);
  if (!err) cas_fill_export(vol, out);
  return err;
}

#if !NBDSERVE_NO_CLIENT
/* ---- Blocks that travel: what is pulled ------------------------------------
 * What comes goes into a partial volume, ID/partial, which only this pull uses.
 * It begins as a copy of the base, the newest sealed snapshot of the same
 * volume.  If an earlier pull has left one behind, this one goes on with it.
 *
 * A pull walks through the tree of the id from the top.  Whatever comes from
 * the peer is compared with the digest that the node above it has, before
 * anything below it is asked for, so nothing gets into the map that was not
 * checked.  What is done about a kid depends on its digest:
 *
 *   of a node
 *     the base has the same at that      done: all below it is here
 *     place, and the volume still has
 *     the base's node there
 *     it is zero                         the whole part becomes a hole
 *     else                               the digests of its kids are fetched
 *   of a leaf, that is a node whose kids are blocks
 *     the volume's own blocks have it    done: an earlier pull got them
 *     else                               the digests of its blocks are fetched
 *   of a block
 *     the volume's own block has it      done
 *     it is zero                         the block becomes a hole
 *     the index finds a block with it    that is read, and compared
 *     else                               the block is fetched
 *
 * Nodes and blocks wait until there are enough of them, so that one round trip
 * gets many: for each level there is a list of nodes, of which the digests of
 * their kids are fetched together, and what comes of these goes to the list
 * below:
 *
 *   level 3: [top] --> level 2: [..] --> level 1: [..] --> 0: [..] --> blocks
 *
 * A list that is full is done at once, which may fill the one below, and so on;
 * what is left at the end is done from the top on.  So memory is bounded, and
 * blocks come in the order in which they lie in the export.
 *
 * Nothing else is noted about how far a pull has come. One that goes on with an
 * earlier one walks through the tree anew, and finds that leaves have what they
 * should: so a power cut, a removal or a gc in between does no harm.
 *
 * No lock is held while the peer is waited for (P3).  In the end the id is
 * computed from the volume's own map, as seal does it, and a snapshot with that
 * map and id appears:
 *
 *   nbdserve_cas_pull     tests the names
 *   cas_pull_head         asks what the peer has
 *   cas_pull_record       is it here?  Else, in the partial volume:
 *   cas_pull_id             the walk, and the seal behind it
 *     cas_pull_nodes          the nodes of a level that are waiting
 *     cas_pull_blocks         blocks, 16 MiB at a time */

/* A node whose kids are to be pulled.  Its level is that of their digests: 0 is
 * a leaf, whose kids are blocks. */
struct cas_wanted {
  uint32_t index;                       /* in its level */
  int has_base;                         /* the base has something there */
  unsigned char digest[CAS_DIGEST_LEN]; /* of the node; of the top: the id */
  unsigned char *own; /* digests that its kids have here: see cas_get_digests */
  unsigned char *kids; /* digests that its kids have at the peer */
  size_t skip; /* bytes in front of kids in the READ, which begins at a multiple
                  of PEER_ALIGN */
  size_t len;  /* bytes of kids: the last node of a level may have fewer */
};

/* Room for the digests of all kids of waiting nodes; and for READs of them,
 * which begin and end at multiples of PEER_ALIGN */
enum {
  CAS_OWN_ROOM = IO_UNIT,
  CAS_KIDS_ROOM = IO_UNIT + CAS_LEAVES * 2 * PEER_ALIGN
};

/* While something is pulled; mostly 20 MiB of it are touched */
struct cas_puller {
  struct cas_volume wanted;   /* its size and id are those of what comes */
  struct cas_sealer sealer;   /* vol: the partial volume */
  struct nbdserve_peer *peer; /* that has the snapshot */
  struct cas_layout at;       /* where its NAME/pull has what */
  size_t most;                /* nodes of a level that wait */
  size_t nnodes[CAS_LEVELS];
  size_t nblocks;
  size_t nparts;
  struct cas_wanted nodes[CAS_LEVELS][CAS_LEAVES]; /* [nnodes] are waiting, */
  struct peer_part asks[CAS_LEVELS][CAS_LEAVES];   /* for these digests, */
  unsigned char kids[CAS_LEVELS][CAS_KIDS_ROOM];   /* with room for them */
  unsigned char own[CAS_LEVELS][CAS_OWN_ROOM];
  struct cas_block blocks[CAS_BLOCKS];            /* [nblocks] are waiting, */
  unsigned char data[CAS_BLOCKS * CAS_MIN_BLOCK]; /* with room for data; */
  struct peer_part parts[CAS_BLOCKS]; /* [nparts]: what the peer is asked for */
};

/* Fetches the digests of the kids of all nodes of a level that are waiting,
 * with zeroes for kids that are not there, and tests them against the digest of
 * the node, which is no digest of zeroes; those of the top against the id. */
static int cas_fetch_kids(struct cas_puller *p, int level) {
  const struct nbdserve_cas *st = p->wanted.st;
  size_t n = p->nnodes[level];
  unsigned char sum[CAS_DIGEST_LEN];
  int err = peer_transfer(p->peer, NBD_CMD_READ, p->asks[level], n);
  for (size_t i = 0; i < n && !err; i++) {
    const struct cas_wanted *node = &p->nodes[level][i];
    err = peer_error(p->peer, &p->asks[level][i]);
    if (err) break;
    memmove(node->kids, node->kids + node->skip, node->len);
    memset(node->kids + node->len, 0, CAS_KIDS_LEN(st) - node->len);
    sha_256(st->hw, node->kids, NULL, CAS_KIDS_LEN(st), sum, NULL);
    if (u_is_zero(node->kids, node->len)) memset(sum, 0, sizeof sum);
    if (level == CAS_LEVELS - 1)
      cas_compute_id(st, p->wanted.now.size, sum, sum);
    if (memcmp(sum, node->digest, CAS_DIGEST_LEN) != 0)
      err = peer_fail(p->peer, -EBADMSG, "the peer's tree does not fit the id");
  }
  return err;
}

/* Notes that a node is waiting, with what its kids have here already; but a
 * leaf is done if all of that fits.  Of a leaf that cannot be read, or has
 * something behind the end, nothing fits, and all of its blocks are asked
 * for. */
static int cas_want_node(struct cas_puller *p, int level, uint32_t index,
                         int has_base, const unsigned char *digest) {
  const struct nbdserve_cas *st = p->wanted.st;
  size_t len = CAS_KIDS_LEN(st);
  size_t i = p->nnodes[level];
  struct cas_wanted *node = &p->nodes[level][i];
  unsigned char sum[CAS_DIGEST_LEN];
  node->index = index;
  node->has_base = has_base;
  memcpy(node->digest, digest, CAS_DIGEST_LEN);
  node->own = p->own[level] + i * len;
  int err = cas_get_digests(&p->sealer, level, index, has_base, node->own);
  if (err && (err != -EIO || level > 0)) return err;
  if (level == 0) {
    uint64_t done = index * (uint64_t)st->fanout * st->bs;
    p->peer->done = u_min(done, p->peer->total);
    if (err) memset(node->own, 255, len); /* no block has such a digest */
    sha_256(st->hw, node->own, NULL, len, sum, NULL);
    if (memcmp(sum, digest, sizeof sum) == 0) return 0;
  }
  uint64_t in = index * (uint64_t)len; /* in d(level) */
  uint64_t off = p->at.at[PART_D0 + level] + in;
  node->skip = (size_t)(off % PEER_ALIGN);
  node->len = (size_t)u_min(len, p->at.len[PART_D0 + level] - in);
  node->kids = p->kids[level] + i * (len + (size_t)2 * PEER_ALIGN);
  size_t n = (node->skip + node->len + PEER_ALIGN - 1) / PEER_ALIGN;
  p->asks[level][i] = (struct peer_part){
      off - node->skip, (uint32_t)(n * PEER_ALIGN), node->kids, 0};
  p->nnodes[level]++;
  assert(i < p->most && in < p->at.len[PART_D0 + level]);
  return 0;
}

/* Is there room for another batch of blocks, in the store and its file system,
 * besides 1 % of the space, or 64 MiB if that is more, which a pull leaves to
 * others? */
static int cas_has_room(struct nbdserve_cas *st) {
  struct nbdserve_cas_stat stat;
  struct statvfs fs;
  nbdserve_cas_stat(st, &stat);
  uint64_t all = stat.file;
  uint64_t left = stat.free;
  if (st->is_device) {
    left += all - u_min(all, cas_data_off(st, st->nslots - 1));
  } else if (fstatvfs(st->fd, &fs) == 0) {
    left += (uint64_t)fs.f_bavail * fs.f_frsize;
    all = (uint64_t)fs.f_blocks * fs.f_frsize;
  }
  uint64_t kept = all / 100 > 64 << 20 ? all / 100 : 64 << 20;
  return left >= kept + CAS_BLOCKS * CAS_MIN_BLOCK;
}

/* Fetches the blocks that are waiting, and stores them.  cas_put compares each
 * with its digest (is_known), those that the peer has sent as well as those
 * that were here, so that nothing gets into the map that does not fit. */
static int cas_pull_blocks(struct cas_puller *p) {
  struct cas_volume *vol = p->sealer.vol;
  if (!p->nblocks) return 0;
  int err = cas_has_room(vol->st) ? 0 : -ENOSPC;
  if (!err) err = peer_transfer(p->peer, NBD_CMD_READ, p->parts, p->nparts);
  for (size_t i = 0; i < p->nparts && !err; i++)
    err = peer_error(p->peer, &p->parts[i]);
  for (size_t i = 0, n; i < p->nblocks && !err; i += n) {
    n = (size_t)u_min(p->nblocks - i, CAS_BATCH);
    cas_put(vol, p->blocks + i, n);
    cas_kick(vol->st);
    for (size_t k = i; k < i + n && !err; k++)
      err = p->blocks[k].err;
  }
  p->nblocks = p->nparts = 0;
  if (err == -EBADMSG)
    peer_fail(p->peer, err, "the peer's blocks do not fit their digests");
  return err;
}

/* Notes that a block is waiting, of which the digest is known.  If the index
 * does not find it, the peer is asked for it; for those in a row together. */
static int cas_want_block(struct cas_puller *p, uint64_t number,
                          const unsigned char *digest) {
  struct nbdserve_cas *st = p->wanted.st;
  struct cas_block *blk = &p->blocks[p->nblocks];
  struct peer_part *last = &p->parts[p->nparts ? p->nparts - 1 : 0];
  uint64_t off = p->at.at[PART_BLOCKS] + number * st->bs;
  *blk = (struct cas_block){.number = number,
                            .data = p->data + p->nblocks * st->bs,
                            .expected = CAS_ANY,
                            .is_known = 1};
  memcpy(blk->digest, digest, CAS_DIGEST_LEN);
  p->nblocks++;
  if (cas_get_block(st, digest, blk->data) != 0) {
    int goes_on = p->nparts && off == last->off + last->len;
    assert(!goes_on || blk->data == last->data + last->len);
    if (goes_on && last->len < PEER_MOST)
      last->len += st->bs;
    else
      p->parts[p->nparts++] = (struct peer_part){off, st->bs, blk->data, 0};
  }
  return (p->nblocks + 1) * st->bs > sizeof p->data ? cas_pull_blocks(p) : 0;
}

/* Do the volume and its base share the node that begins at a block and has so
 * many blocks below it?  (locks) */
static int cas_has_base(const struct cas_puller *p, uint64_t block,
                        uint64_t blocks) {
  struct nbdserve_cas *st = p->wanted.st;
  uint64_t span;
  assert(p->sealer.base);
  os_lock(&st->lock);
  struct cas_node **root[2] = {cas_root(p->sealer.vol),
                               cas_root(p->sealer.base)};
  int is_shared = cas_is_shared(st, root, block, &span);
  cas_unlock(st);
  return is_shared && span >= blocks;
}

/* Pulls what is below the nodes of a level that are waiting, with so many
 * blocks below each kid.  What is to be asked for is left waiting, until there
 * is enough of it. */
static int cas_pull_nodes(struct cas_puller *p, int level, uint64_t size) {
  const struct nbdserve_cas *st = p->wanted.st;
  int err = cas_fetch_kids(p, level);
  for (size_t i = 0; i < p->nnodes[level] && !err; i++) {
    const struct cas_wanted *node = &p->nodes[level][i];
    for (size_t at = 0; at < node->len && !err; at += CAS_DIGEST_LEN) {
      const unsigned char *kid = node->kids + at;
      const unsigned char *own = node->own + at;
      uint64_t c = (uint64_t)node->index * st->fanout + at / CAS_DIGEST_LEN;
      /* Digests of blocks are those of the volume's own. Others are the base's,
       * and say something about the volume only where it still has the same
       * node there. */
      int is_same = memcmp(kid, own, CAS_DIGEST_LEN) == 0;
      if (level > 0 && is_same)
        is_same = node->has_base && cas_has_base(p, c * size, size);
      if (is_same) continue;
      if (u_is_zero(kid, CAS_DIGEST_LEN)) {
        err = cas_discard(p->sealer.vol, c * size * st->bs, size * st->bs);
      } else if (level == 0) {
        err = cas_want_block(p, c, kid);
      } else {
        err = cas_want_node(p, level - 1, (uint32_t)c,
                            !u_is_zero(own, CAS_DIGEST_LEN), kid);
        if (!err && p->nnodes[level - 1] == p->most)
          err = cas_pull_nodes(p, level - 1, size / st->fanout);
      }
    }
  }
  p->nnodes[level] = 0;
  return err;
}

/* Uses the partial volume that is called `part`.  The change makes it, with the
 * base's contents, unless it is there: then it changes nothing.  That somebody
 * goes on with it is noted in its record, which the next checkpoint writes: gc
 * removes it a week after that.  -EBUSY: another pull uses it. */
static int cas_use_partial(struct cas_puller *p, const char *part) {
  struct nbdserve_cas *st = p->wanted.st;
  struct cas_change change = {
      .name = part, .size = p->wanted.now.size, .tree = p->sealer.base};
  int err = 0;
  while (!err && !p->sealer.vol) {
    err = cas_apply(st, &change);
    os_lock(&st->lock);
    if (!err) err = cas_get_pairs(st, CAS_RESERVE_PAIRS + CAS_MARGIN);
    struct cas_volume *vol = cas_find(st, part, strlen(part), VIEW_THEN);
    /* It may be gone by now, or about to go: then another one is made. */
    if (!err && vol && !vol->is_staged) {
      err = vol->clients ? -EBUSY : cas_own_record(st, vol->place, &vol->page);
      if (!err) {
        vol->clients = 1;
        vol->now.created = vol->then.created = (uint64_t)time(NULL);
        p->sealer.vol = vol;
      }
    }
    cas_unlock(st);
  }
  return err;
}

/* Pulls the blocks of an id into the partial volume of that name.  When the id
 * that was computed from them is the right one, the snapshot appears in one
 * checkpoint; up to then all that came is in the partial volume, and survives
 * there. */
static int cas_pull_id(struct cas_puller *p, const char *part) {
  const unsigned char *id = p->wanted.now.cid;
  struct nbdserve_cas *st = p->wanted.st;
  struct cas_sealer *sealer = &p->sealer;
  uint64_t size = st->max_blocks; /* blocks below a node */
  int top = CAS_LEVELS - 1;
  int err = cas_begin_seal(st, sealer);
  if (!err && p->at.len[PART_D0])
    err = cas_want_node(p, top, 0, sealer->base != NULL, id);
  /* Nothing is made before it is known that the id, and the size, are those of
   * what the peer says is at the top of its tree. */
  if (!err) err = cas_fetch_kids(p, top);
  if (!err) err = cas_use_partial(p, part);
  for (int level = top; level >= 0 && !err; level--) {
    size /= st->fanout;
    err = cas_pull_nodes(p, level, size);
  }
  if (!err) err = cas_pull_blocks(p);
  if (!err) err = cas_clear_tail(sealer->vol); /* the base's, or the peer's */
  /* A checkpoint frees nodes that are dirty and empty.  After this one none of
   * the map is dirty, so none goes while cas_seal_tree walks through it. */
  if (!err) err = cas_checkpoint(st, NULL, UINT64_MAX);
  if (!err) err = cas_seal_tree(sealer);
  if (!err && memcmp(sealer->tree->now.cid, id, CAS_DIGEST_LEN) != 0)
    err = peer_fail(p->peer, -EBADMSG, "the peer's tree is not that of the id");
  struct cas_change change = {
      .vol = sealer->vol, .tree = sealer->tree, .name = sealer->name};
  if (!err) err = cas_apply(st, &change);
  cas_end_seal(sealer);
  if (sealer->vol) cas_unhide(sealer->vol);
  return err;
}

/* Makes the snapshot of what has the id that is wanted: of one that is here, or
 * of what is pulled for it. */
static int cas_pull_record(struct cas_puller *p) {
  struct nbdserve_cas *st = p->wanted.st;
  struct cas_volume *there;
  char id[72];
  char part[sizeof id + sizeof CAS_PARTIAL];
  cas_spell_id(&p->wanted, id);
  snprintf(part, sizeof part, "%s" CAS_PARTIAL, id);
  int err = cas_use(st, id, strlen(id), &there);
  if (err) return cas_pull_id(p, part);
  os_lock(&st->lock);
  struct cas_volume tree = cas_tree_of(there);
  int has_all = cas_has_all(there);
  cas_unlock(st);
  struct cas_change change = {
      .vol = there, .tree = &tree, .name = p->sealer.name};
  if (has_all) err = cas_apply(st, &change);
  cas_close(there);
  return has_all ? err : cas_pull_id(p, part);
}

/* Enters the export FROM/pull of the peer, and tests what its head says: that
 * is the size and the id which are wanted. */
static int cas_pull_head(struct cas_puller *p, const char *from) {
  struct nbdserve_cas *st = p->wanted.st;
  struct nbdserve_peer *peer = p->peer;
  unsigned char head[CAS_PAGE] = {0};
  char export[WIRE_STRING_MAX + 8];
  unsigned char none[CAS_DIGEST_LEN] = {0};
  char id[72];
  snprintf(export, sizeof export, "%.*s/pull", WIRE_STRING_MAX, from);
  int err = cas_enter_store(st, peer, export, CAS_PULL_MAGIC, head);
  if (err == -ENOENT)
    strncat(peer->why, " (only what is sealed can be pulled)",
            sizeof peer->why - strlen(peer->why) - 1);
  if (err) return err;
  uint64_t size = u_get64(head + 16);
  p->wanted.now.size = peer->total = size;
  memcpy(p->wanted.now.cid, head + 24, CAS_DIGEST_LEN);
  p->at = cas_pull_layout(st->bs, size);
  if (!cas_is_size(st, size) || p->at.end != peer->size ||
      cas_blocks(st, size) / st->fanout >= UINT32_MAX)
    return peer_fail(peer, -EPROTO, "the peer's sizes make no sense");
  /* Of a size of 0 there is no top of a tree that could be tested later. */
  cas_compute_id(st, 0, none, none);
  if (!size && memcmp(none, p->wanted.now.cid, sizeof none) != 0)
    return peer_fail(peer, -EBADMSG, "the peer's tree does not fit the id");
  if (cas_is_id(from, "") && strcmp(from, cas_spell_id(&p->wanted, id)) != 0)
    return peer_fail(peer, -EBADMSG, "the peer has given another id");
  return 0;
}

/* See nbdserve.h. */
int nbdserve_cas_pull(struct nbdserve_cas *st, const char *name,
                      const char *from, struct nbdserve_peer *peer) {
  struct cas_volume *there = NULL;
  char up[CAS_PATH];
  const char *at = strchr(name, '@');
  *peer->why = 0;
  snprintf(up, sizeof up, "%.*s", at ? (int)(at - name) : 0, name);
  if (!at || !cas_is_name(at + 1) || !cas_is_name(up)) return -EINVAL;
  if (st->readonly) return -EROFS;
  struct cas_puller *p = NBDSERVE_MALLOC(sizeof *p);
  if (!p) return -ENOMEM;
  memset(p, 0, offsetof(struct cas_puller, nodes));
  p->wanted.st = st;
  p->peer = peer;
  p->sealer.name = name;
  p->sealer.progress = peer->progress;
  p->sealer.arg = peer->arg;
  p->most = (size_t)u_min(CAS_LEAVES, CAS_OWN_ROOM / CAS_KIDS_LEN(st));
  int err = cas_pull_head(p, from);
  if (!err) (void)!cas_use(st, name, strlen(name), &there);
  if (there) { /* was it pulled before, and is it whole? */
    os_lock(&st->lock);
    if (!cas_has_all(there)) err = -EUCLEAN;
    if (memcmp(there->now.cid, p->wanted.now.cid, CAS_DIGEST_LEN) != 0)
      err = -EEXIST;
    cas_unlock(st);
    cas_close(there);
  }
  if (!err && !there) err = cas_pull_record(p);
  peer_leave(peer);
  NBDSERVE_FREE(p);
  return err;
}
#endif /* !NBDSERVE_NO_CLIENT */

#endif /* !NBDSERVE_NO_CAS */

/* ==== [13] SERVER (srv_) =================================================
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
 *   srv_new_conn      makes struct conn, puts it on the list
 *   srv_thread        the thread that all of the rest happens in
 *   hs_run            the handshake; hs_enter where there is none
 *   tx_run            its requests, to the last answer
 *   io_linger         waits until the answers have arrived, where it must
 *   ex_release        gives back the export
 *   srv_free_conn     takes it off the list, closes its socket
 *
 * (S1) A client is on s->conns while it is there, so that srv_finish finds it.
 * (S2) A client's thread leaves that list under s->lock, and touches s no more
 *      once it has given that lock back.
 * (S3) Stopping has one order, and each step is here or named here:
 *        1. No new clients: the listeners are closed (nbdserve_unlisten).
 *        2. The command's part: a captive command is told, and served until it
 *           has ended ([14], cli_serve).
 *        3. No new requests: nbdserve_stop makes the stop pipe readable, and
 *           srv_finish shuts down the receiving side of unix sockets.
 *        4. What was sent before is done and answered, in the clients' threads.
 *        5. TCP: io_linger, so that these answers arrive.
 *        6. When the grace is over, srv_finish cuts off who is left.  There is
 *           one grace for all of 3 to 5 (I3).  A thread inside a backend is
 *           waited for without limit: nothing can end it.
 *        7. All exports are flushed.
 *        8. nbdserve_free closes them.
 * (S4) nbdserve_stop has a pipe.  nbdserve_wake and a client that leaves have
 *      the two directions of another one, s->wake.  That a pipe is readable
 *      says it all, so a full one loses nothing. */

enum {
  SRV_CONNECT = 0, /* what a socket is made for */
  SRV_LISTEN = 1,
  SRV_OWN_FDS = 3,    /* that nbdserve_run looks at before listeners */
  SRV_PAUSE_MS = 100, /* after an accept() that failed: do not spin */
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

/* See nbdserve.h.  Until it has succeeded nobody else knows the server. */
int nbdserve_new(struct nbdserve **out, const struct nbdserve_config *config) {
  struct nbdserve_config k = {.version = NBDSERVE_VERSION_NUMBER};
  *out = NULL;
  /* Of another version the rest of *config may not even be there. */
  if (config && config->version / 100 != NBDSERVE_VERSION_NUMBER / 100)
    return -EINVAL;
  if (config) k = *config;
  if (!k.threads) k.threads = 16;
  if (!k.max_conn) k.max_conn = 128;
  if (NBDSERVE_NO_THREADS) k.max_conn = k.threads = 1;
  if (!k.handshake_ms) k.handshake_ms = 10000;
  if (!k.stall_ms) k.stall_ms = 120000;
  /* Fast zeroes are zeroes, and extended headers need GO. */
  if (k.without & NBD_FLAG_SEND_WRITE_ZEROES)
    k.without |= NBD_FLAG_SEND_FAST_ZERO;
  if (k.without & 1u << (HS_WITHOUT_OPTIONS + NBD_OPT_GO))
    k.without |= 1u << (HS_WITHOUT_OPTIONS + NBD_OPT_EXTENDED_HEADERS);
  assert(k.threads && k.max_conn && k.handshake_ms && k.stall_ms);
  if (k.threads > 1024 || k.max_conn > SRV_MAX_CONN) return -EINVAL;
  if (k.flags & ~NBDSERVE_CONFIG_ONCE) return -EINVAL;
  struct nbdserve *s = u_zalloc(sizeof *s);
  if (!s) return -ENOMEM;
  os_monitor_init(&s->lock);
  s->config = k;
  s->cpus = sysconf(_SC_NPROCESSORS_ONLN);
  memset(s->stop, -1, sizeof s->stop); /* all bits set: -1 */
  memset(s->wake, -1, sizeof s->wake);
  int err = os_pipe(s->stop);
  if (!err) err = os_pipe(s->wake);
  if (!err) *out = s;
  s->finished = err != 0; /* then nothing has begun */
  if (err) nbdserve_free(s);
  return err;
}

/* See nbdserve.h.  After an error no export was made: ctx is the caller's. */
int nbdserve_add(struct nbdserve *s, const struct nbdserve_export *e) {
  os_lock(&s->lock);
  struct ex **place = ex_by_name(s, e->name ? e->name : "");
  int err = *place ? -EEXIST : ex_new(s, e, place);
  os_unlock(&s->lock);
  return err;
}

/* See nbdserve.h.  Clients that are there keep the size that they were told. */
int nbdserve_resize(struct nbdserve *s, const char *name, uint64_t size) {
  if (size > INT64_MAX) return -EINVAL;
  os_lock(&s->lock);
  struct ex *ex = *ex_by_name(s, name ? name : "");
  if (ex) ex->pub.size = size;
  os_unlock(&s->lock);
  return ex ? 0 : -ENOENT;
}

/* ---- Listening ----------------------------------------------------------- */

/* Adds a listener on fd, which the server owns from now on.  text: the path of
 * a unix socket, HOST:PORT of a TCP one, or "".  Returns 0. */
static int srv_add_listener(struct nbdserve *s, int fd, int is_unix,
                            const char *text) {
  assert(fd >= 0 && s->nlisteners <= SRV_LISTENERS);
  struct srv_listener *l = &s->listeners[s->nlisteners++];
  os_set_fd_flags(fd, O_NONBLOCK);
  l->fd = fd;
  l->is_unix = is_unix && lstat(text, &l->st) == 0;
  snprintf(l->text, sizeof l->text, "%s", text);
  return 0;
}

/* Closes the newest listener, and removes its unix socket unless another one
 * has taken its place. */
static void srv_drop_listener(struct nbdserve *s) {
  assert(s->nlisteners > 0);
  struct srv_listener *l = &s->listeners[--s->nlisteners];
  close(l->fd);
  if (l->is_unix) os_remove_same(l->text, &l->st);
}

/* See nbdserve.h. */
void nbdserve_unlisten(struct nbdserve *s) {
  while (s->nlisteners > 0)
    srv_drop_listener(s);
}

/* Makes a socket that listens at an address or is connected to it.  Nobody
 * waits for the other side: the socket does not block.  A descriptor, or
 * -errno. */
static int srv_socket(const union srv_address *a, socklen_t len, int listens) {
  int fd = socket(a->sa.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return -errno;
  os_set_fd_flags(fd, O_NONBLOCK);
  /* Nothing comes of these for a unix socket, and only such a one connects. */
  os_set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
  os_set_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
  int r = listens ? bind(fd, &a->sa, len) : connect(fd, &a->sa, len);
  if (r == 0 && listens) r = listen(fd, 128);
  int err = r < 0 ? -errno : 0;
  if (err) close(fd);
  return err ? err : fd;
}

/* Removes a unix socket on which nobody listens.  True: it is gone. */
static int srv_remove_leftover(const union srv_address *a) {
  struct stat st;
  if (lstat(a->un.sun_path, &st) < 0 || !S_ISSOCK(st.st_mode)) return 0;
  int fd = srv_socket(a, sizeof a->un, SRV_CONNECT);
  if (fd >= 0) close(fd);
  return fd == -ECONNREFUSED && unlink(a->un.sun_path) == 0;
}

/* Makes a unix socket that listens at path, where a leftover is replaced, or is
 * connected to it.  A descriptor, or -errno.
 *
 * Between bind() and listen() a socket refuses connections, and to another
 * server that comes just then it looks like a leftover.  So who wants to listen
 * locks the directory, and waits for others for a second at most. */
static int srv_unix_socket(const char *path, int listens) {
  union srv_address a = {.un = {.sun_family = AF_UNIX}};
  if (!*path) return -EINVAL;
  if (strlen(path) >= sizeof a.un.sun_path) return -ENAMETOOLONG;
  strcpy(a.un.sun_path, path);
  int dir = listens ? os_open_dir(path) : -1;
  for (int i = 0; dir >= 0 && i < 100; i++) {
    /* Where there are no locks we go on without. */
    if (flock(dir, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) break;
    poll(NULL, 0, 10);
  }
  int fd = srv_socket(&a, sizeof a.un, listens);
  if (fd == -EADDRINUSE && srv_remove_leftover(&a))
    fd = srv_socket(&a, sizeof a.un, listens);
  if (dir >= 0) close(dir);
  return fd;
}

#if !NBDSERVE_NO_TCP
/* Writes an internet address to out[size], as people and URIs have it; another
 * address leaves it as it is. */
static void srv_format_address(union srv_address *a, char *out, size_t size) {
  char host[INET6_ADDRSTRLEN];
  int is_v6 = a->sa.sa_family == AF_INET6;
  const void *ip = is_v6 ? (void *)&a->in6.sin6_addr : &a->in.sin_addr;
  if (inet_ntop(a->sa.sa_family, ip, host, sizeof host))
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
  void *ip = is_v6 ? (void *)&a.in6.sin6_addr : &a.in.sin_addr;
  if (inet_pton(a.sa.sa_family, host, ip) != 1) return -EINVAL;
  int fd = srv_socket(&a, len, SRV_LISTEN);
  if (fd < 0) return fd;
  getsockname(fd, &a.sa, &len);
  *port = ntohs(a.in.sin_port);
  srv_format_address(&a, text, sizeof text);
  return srv_add_listener(s, fd, 0, text);
}

/* Listens at HOST:PORT or [HOST]:PORT.  "localhost" is both loopback addresses,
 * at the same port.  A port that the kernel picked for one may be taken on the
 * other: then it picks another one. */
static int srv_listen_tcp(struct nbdserve *s, const char *address) {
  const char *colon = strrchr(address, ':');
  uint64_t port = 0;
  char host[64];
  if (!colon || !u_parse_number(colon + 1, 65535, &port)) return -EINVAL;
  int bracket = *address == '[' && colon[-1] == ']'; /* its length */
  int len = (int)(colon - address) - 2 * bracket;
  /* A host that is cut is none. */
  snprintf(host, sizeof host, "%.*s", len, address + bracket);
  if (strcmp(host, "localhost") != 0) return srv_listen_ip(s, host, &port);
  int err = -EADDRINUSE;
  for (int left = port ? 1 : 16; left > 0 && err == -EADDRINUSE; left--) {
    uint64_t picked = port;
    err = srv_listen_ip(s, "127.0.0.1", &picked);
    if (err) return err;
    err = srv_listen_ip(s, "::1", &picked);
    /* The latter two: there is no IPv6. */
    if (!err || err == -EAFNOSUPPORT || err == -EADDRNOTAVAIL) return 0;
    srv_drop_listener(s); /* nothing half done */
  }
  return err;
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
  return listens ? srv_add_listener(s, (int)fd, 0, "") : -EINVAL;
}

/* See nbdserve.h. */
int nbdserve_listen(struct nbdserve *s, const char *address) {
  if (s->nlisteners >= SRV_LISTENERS) return -EMFILE;
  if (strncmp(address, "tcp:", 4) == 0) return srv_listen_tcp(s, address + 4);
  if (strncmp(address, "fd:", 3) == 0) return srv_listen_fd(s, address + 3);
  if (strncmp(address, "unix:", 5) != 0) return -EINVAL;
  int fd = srv_unix_socket(address + 5, SRV_LISTEN);
  return fd < 0 ? fd : srv_add_listener(s, fd, 1, address + 5);
}

/* Writes the URI of an export at a listener, as nbdserve_uri. */
static int srv_uri(const struct srv_listener *l, const char *name, char *buf,
                   size_t size) {
  int n = snprintf(buf, size, "nbd%s://%s/", l->is_unix ? "+unix" : "",
                   l->is_unix ? "" : l->text);
  if ((size_t)n >= size) return -ERANGE;
  if (!u_append_uri(buf, size, name ? name : "")) return -ERANGE;
  if (!l->is_unix) return 0;
  /* No room: nor for the path. */
  strncat(buf, "?socket=", size - strlen(buf) - 1);
  return u_append_uri(buf, size, l->text) ? 0 : -ERANGE;
}

/* See nbdserve.h.  The first listener counts. */
int nbdserve_uri(struct nbdserve *s, const char *name, char *buf, size_t size) {
  if (!s->nlisteners || !*s->listeners->text) return -ENOENT;
  return srv_uri(s->listeners, name, buf, size);
}

/* ---- Signals from other threads and handlers ----------------------------- */

/* Makes a pipe readable, by the time: see struct io.  Async-signal-safe, and
 * keeps errno.  A full pipe is readable already (S4). */
static void srv_poke(int fd) {
  int saved = errno;
  int64_t now = os_now_ms();
  (void)!write(fd, &now, sizeof now);
  errno = saved;
}

/* Empties a pipe. */
static void srv_take_pokes(int fd) {
  char waste[64];
  while (read(fd, waste, sizeof waste) > 0)
    continue;
}

/* See nbdserve.h.  Nobody ever empties this pipe: there is no way back. */
void nbdserve_stop(struct nbdserve *s) {
  srv_poke(s->stop[1]);
}

/* See nbdserve.h. */
void nbdserve_wake(struct nbdserve *s) {
  srv_poke(s->wake[1]);
}

/* ---- Statistics ---------------------------------------------------------- */

/* See nbdserve.h. */
void nbdserve_stats(struct nbdserve *s, struct nbdserve_stats *out) {
  os_lock(&s->lock);
  *out = s->totals;
  os_unlock(&s->lock);
}

/* ---- A client's life ----------------------------------------------------- */

/* Makes a client and registers it (S1).  fd: a socket that is closed in the
 * end, or -1.  NULL: no memory; all descriptors stay the caller's. */
static struct conn *srv_new_conn(struct nbdserve *s, int in, int out, int fd) {
  union srv_address a = {.sa = {.sa_family = AF_UNSPEC}}; /* a pipe's */
  socklen_t len = sizeof a;
  struct conn *c = NBDSERVE_MALLOC(sizeof *c);
  if (!c) return NULL;
  memset(c, 0, offsetof(struct conn, batch)); /* the rest stays untouched */
  c->s = s;
  c->fd = fd;
  c->pipe[0] = -1;
  c->queue_end = &c->queue;
  os_monitor_init(&c->queue_lock);
  os_monitor_init(&c->send_lock);
  getpeername(out, &a.sa, &len);
  c->is_tcp = a.sa.sa_family == AF_INET || a.sa.sa_family == AF_INET6;
  strcpy(c->peer, "this machine");
  srv_format_address(&a, c->peer, sizeof c->peer);
  c->io = (struct io){.in = in, .out = out, .stop = *s->stop};
  c->io.lifeline = s->lifeline;
  c->io.stall_ms = s->config.stall_ms;
  /* See the table at the head of [6].  Without threads it is nbdserve_run that
   * serves: nobody would shut down. */
  c->io.polls = fd < 0 || c->is_tcp || NBDSERVE_NO_THREADS;
  assert(c->io.stall_ms > 0 && !c->export);
  os_setup_client(out);
  os_lock(&s->lock);
  c->next = s->conns;
  s->conns = c;
  s->totals.clients_now++;
  os_unlock(&s->lock);
  return c;
}

/* Takes a client off the list, closes its socket if it is ours, and frees
 * it. */
static void srv_free_conn(struct conn *c) {
  struct nbdserve *s = c->s;
  assert(!c->nworkers && !c->nhanded_over);
  os_lock(&s->lock);
  struct conn **p = &s->conns;
  assert(s->totals.clients_now > 0);
  while (*p != c)
    p = &(*p)->next;
  *p = c->next;
  s->totals.clients_now--;
  if (!s->conns) s->idle_since = os_now_ms();
  /* Locked, so that srv_finish does not shut down another file of that
   * number. */
  if (c->fd >= 0) close(c->fd);
  tx_close_pipe(c);
  while (c->nspares > 0)
    NBDSERVE_FREE(c->spare[--c->nspares]);
  os_monitor_free(&c->queue_lock);
  os_monitor_free(&c->send_lock);
  NBDSERVE_FREE(c);
  srv_poke(s->wake[0]); /* [1] becomes readable */
  os_unlock(&s->lock);  /* (S2) */
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
          ex->pub.name, strerror(-err));
  return err;
}

/* Serves a client to its end and frees it.  name: as in nbdserve_serve.
 * Returns 0 or -errno. */
static int srv_serve_client(struct conn *c, const char *name) {
  const struct nbdserve_config *k = &c->s->config;
  os_lock(&c->s->lock);
  c->id = (int)++c->s->totals.clients;
  os_unlock(&c->s->lock);
  conn_log(c, NBDSERVE_LOG_INFO, "connected from %s", c->peer);
  int err = name ? hs_enter(c, name) : hs_run(c);
  if (!err && k->entered)
    k->entered(k->ctx, c->io.in, c->export->pub.name, &c->info);
  if (!err) err = tx_run(c);
  assert(!c->nworkers && (err == CONN_LEFT || err < 0));
  /* Of a TCP socket of ours the last replies must arrive, if it is our side
   * that ends it while the client may be sending.  One that leaves in order
   * sends nothing more; one that is too slow, or does not even come to
   * transmission, gets no more of our time. */
  int lingers = c->is_tcp && c->fd >= 0 && c->export && !c->send_err;
  if (lingers && err < 0 && err != -ETIMEDOUT) io_linger(&c->io);
  if (err == CONN_LEFT) err = c->send_err; /* or it was cut off: not reading */
  if (c->export && c->export->from_callback) srv_last_flush(c->export);
  hs_leave(c);
  hs_drop_contexts(c);
  int is_ok = !err || err == -EPIPE || err == -ECONNRESET || err == -ESHUTDOWN;
  conn_log(c, is_ok ? NBDSERVE_LOG_INFO : NBDSERVE_LOG_WARNING, "gone: %s",
           err ? strerror(-err) : "disconnected");
  srv_free_conn(c);
  return err == -ESHUTDOWN ? 0 : err;
}

/* The thread of an accepted client. */
static void *srv_thread(void *client) {
  srv_serve_client(client, NULL);
  return NULL;
}

/* See nbdserve.h. */
int nbdserve_serve(struct nbdserve *s, int in, int out, const char *name) {
  struct conn *c = srv_new_conn(s, in, out, -1);
  return c ? srv_serve_client(c, name) : -ENOMEM;
}

/* ---- Stopping (S3) ------------------------------------------------------- */

/* Steps 1 and 3 to 7 of (S3).  0, or the error of a last flush. */
static int srv_finish(struct nbdserve *s) {
  struct pollfd p = {.fd = s->wake[1], .events = POLLIN};
  int first = 0;
  nbdserve_unlisten(s);
  nbdserve_stop(s);
  assert(!s->nlisteners);
  int64_t end = io_grace_end(*s->stop);
  for (;;) {
    int over = os_now_ms() >= end; /* then nothing more is sent, either */
    os_lock(&s->lock);
    int are_left = s->conns != NULL;
    /* Those that are left out look at the stop pipe. */
    for (struct conn *c = s->conns; c; c = c->next)
      if (c->fd >= 0 && (over || !c->is_tcp))
        shutdown(c->fd, over ? SHUT_RDWR : SHUT_RD);
    os_unlock(&s->lock);
    if (!are_left) break;
    poll(&p, 1, over ? -1 : io_timeout(end)); /* until one has left */
    srv_take_pokes(s->wake[1]);
  }
  s->finished = 1;
  for (struct ex *ex = ex_next(s, NULL); ex; ex = ex_next(s, ex)) {
    int err = srv_last_flush(ex);
    if (!first) first = err;
  }
  return first;
}

/* ---- Accepting ----------------------------------------------------------- */

/* Accepts a client and starts its thread.  Returns 1, 0 if nobody was there
 * after all, or -errno if nobody can be served now. */
static int srv_accept(struct nbdserve *s, int listener) {
  int fd = os_accept(listener);
  if (fd == -EAGAIN || fd == -ECONNABORTED || fd == -EINTR) return 0;
  if (fd < 0) return fd;
  struct conn *c = srv_new_conn(s, fd, fd, fd);
  int err = c ? os_thread(srv_thread, c) : -ENOMEM;
  if (!c) close(fd);
  if (c && err) srv_free_conn(c); /* closes fd, too */
  return err ? err : 1;
}

/* See nbdserve.h.  Rounds of: wait, look at each pipe, accept. */
int nbdserve_run(struct nbdserve *s) {
  const struct nbdserve_config *k = &s->config;
  struct pollfd p[SRV_OWN_FDS + SRV_LISTENERS + 1] = {
      {.fd = s->stop[0], .events = POLLIN},
      {.fd = s->wake[0], .events = POLLIN},
      {.fd = s->wake[1], .events = POLLIN}};
  struct pollfd *l = p + SRV_OWN_FDS; /* the listeners */
  for (;;) {
    int64_t now = os_now_ms();
    int64_t until = INT64_MAX; /* when we may end, if nobody waits then */
    int n = s->nlisteners;
    os_lock(&s->lock);
    if (!s->idle_since) s->idle_since = now; /* nobody has come yet */
    if (!s->conns && k->idle_exit_ms) until = s->idle_since + k->idle_exit_ms;
    if (!s->conns && s->totals.clients > 0 && k->flags & NBDSERVE_CONFIG_ONCE)
      until = now;
    int room = (int)k->max_conn - (int)s->totals.clients_now;
    os_unlock(&s->lock);
    /* When all slots are taken nobody is accepted, but that somebody waits is
     * worth a message now and then. */
    int listens = room > 0 || now >= s->tell_after;
    /* The first is the one behind that which the last client came from, so that
     * all get their share of the slots. */
    for (int i = 0; i < n; i++) {
      int fd = s->listeners[(s->turn + i) % n].fd;
      l[i] = (struct pollfd){listens ? fd : -1, POLLIN, 0};
    }
    int r = poll(p, (nfds_t)(SRV_OWN_FDS + n), io_timeout(until));
    if (r < 0 && errno != EINTR) return -errno;
    if (r < 0) continue;
    if (p[0].revents) return srv_finish(s);
    if (p[1].revents) srv_take_pokes(s->wake[0]);
    if (p[1].revents) return -EINTR;
    if (p[2].revents) srv_take_pokes(s->wake[1]);
    int i = 0;
    while (i < n && !l[i].revents)
      i++;
    if (i == n && until <= now) return srv_finish(s);
    if (i == n) continue;
    r = room > 0 ? srv_accept(s, l[i].fd) : 0;
    if (r > 0) s->turn = (s->turn + i + 1) % n;
    /* Somebody waits who cannot be served: that is said once a minute. */
    if ((room <= 0 || r < 0) && os_now_ms() >= s->tell_after) {
      s->tell_after = os_now_ms() + 60000;
      u_log(k, NBDSERVE_LOG_WARNING,
            "%s; the next client has to wait (limit: %" PRIu32 ")",
            r < 0 ? strerror(-r) : "all slots are taken", k->max_conn);
    }
    /* No memory, no descriptors: do not spin. */
    if (r < 0) poll(p, 1, SRV_PAUSE_MS);
  }
}

/* See nbdserve.h. */
void nbdserve_free(struct nbdserve *s) {
  if (!s) return;
  if (!s->finished) srv_finish(s); /* nbdserve_run did not come to its end */
  assert(!s->conns && !s->nlisteners);
  for (struct ex *next, *ex = s->exports; ex; ex = next) {
    next = ex->next;
    ex_free(ex);
  }
  for (int i = 0; i < 2; i++) { /* -1, if nbdserve_new failed, does no harm */
    close(s->stop[i]);
    close(s->wake[i]);
  }
  os_monitor_free(&s->lock);
  NBDSERVE_FREE(s);
}

/* ==== [14] CLI (cli_) ====================================================
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
 * thread cli_control and one for each command that is being done.  What all of
 * them read, `opt` and most of `cli`, does not change after the server has
 * started.
 *
 * To add a command-line option: a row in CLI_OPTIONS, from which --help prints
 * it.  opt[] has its value then; if that is more than a text or a number
 * cli_set_option checks it.  What the option must not be combined with goes to
 * cli_check_options.
 *
 * To add a command on stores: a function that does it, and a row in cli_verbs,
 * from which --help prints it, too.
 *
 * To add a kind of target: cli_add_target, which tells targets apart. */
#if !NBDSERVE_NO_MAIN
#include <sys/wait.h>

/* Exit status, if it is not 0.  A command that is served may have any other
 * one. */
enum {
  CLI_FAILED = 1,     /* a message says why */
  CLI_USAGE = 2,      /* the command line makes no sense */
  CLI_DAMAGED = 3,    /* a store is damaged */
  CLI_IN_USE = 4,     /* somebody else has the target */
  CLI_BY_SIGNAL = 128 /* as a shell says it: plus the number of the signal */
};

/* ---- Options ------------------------------------------------------------
 * opt[OPT_PORT] is what is known of an option, and what the command line says
 * of it: cli_parse fills that in, and nobody changes it later.  What was not
 * given is 0 or NULL, which is the default for nbdserve.h as well; where 0 is a
 * value of its own (a port, a descriptor) `given` tells the difference. */

struct cli_option {
  /* What stands behind "-"; 0: there is no short form. */
  char letter;
  /* What stands behind "--".  If the option takes a value, a blank and what
   * --help calls that follow: "port N". */
  const char *name;
  const char *help;
  /* The range of an option that takes a number; max is 0: it takes none. */
  uint64_t min;
  uint64_t max;
  /* How often the option was given.  A command behind "--" counts as --run. */
  unsigned given;
  /* The value as it was written; it stays in argv. */
  const char *text;
  /* The value of an option that takes a number; --connect: N of /dev/nbdN;
   * --sandbox: SANDBOX_...; --without: bits of nbdserve_config.without */
  uint64_t number;
};

/* clang-format off */

/* The options, in the order of --help: what stands in struct cli_option, up to
 * `help`, or to `max` if the option takes a number.  This is a list of macros,
 * so that it says all about an option in one place. */
#define CLI_OPTIONS(X) \
  X(UNIX, 'U', "unix PATH", "listen on a unix socket (default: private)") \
  X(PORT, 'p', "port N", "listen on TCP (usual: 10809; 0: any)", 0, 65535) \
  X(BIND, 'i', "bind ADDR", "TCP address (default: the two of loopback)") \
  X(STDIN, 's', "stdin", "serve one client on standard input and output") \
  X(FD, 0, "fd N", "serve a listening or connected socket", 0, INT_MAX) \
  X(CONNECT, 'c', "connect DEVICE", "serve the kernel here as /dev/nbdN") \
  X(READ_ONLY, 'r', "read-only", "refuse writes") \
  X(EXPORT, 'e', "export NAME", "name of the export (default: any)") \
  X(DESCRIPTION, 'D', "description TEXT", "for clients that list the exports") \
  X(OFFSET, 'o', "offset N", "serve the target from byte N on", 0, INT64_MAX) \
  X(SIZE, 0, "size N", "serve only N bytes of the target", 1, INT64_MAX) \
  X(BLOCK_SIZE, 'b', "block-size SIZES", "MIN:PREFERRED:MAX (1:4096:32M)") \
  X(CREATE, 0, "create SIZE", "make a missing target, sparse", 1, INT64_MAX) \
  X(CHANGES, 0, "changes SNAP", "the only bitmap offered: changed since SNAP") \
  X(TEMPORARY, 'T', "temporary", "discard at exit what clients have written") \
  X(CACHE, 0, "cache MODE", "writeback (default), writethrough or unsafe") \
  X(THREADS, 't', "threads N", "slow requests per client (16)", 1, 1024) \
  X(MAX_CONN, 'm', "max-conn N", "clients at a time (128)", 1, SRV_MAX_CONN) \
  X(STALL, 0, "stall SEC", "end clients stalled midway (120)", 1, 4000000) \
  X(ONCE, '1', "once", "exit when the last client has left") \
  X(IDLE_EXIT, 0, "idle-exit SEC", "exit when unused for SEC", 1, 4000000) \
  X(PARENT, 0, "exit-with-parent", "exit when the parent process ends") \
  X(RUN, 0, "run CMD", "serve while a shell command runs ($uri, $nbd)") \
  X(FORK, 0, "fork", "go into the background once it listens") \
  X(PIDFILE, 'P', "pidfile FILE", "write the process id once it listens") \
  X(READY_FD, 0, "ready-fd N", "write the URI once it listens", 3, INT_MAX) \
  X(SANDBOX, 0, "sandbox MODE", "auto (default), off or require (see README)") \
  X(QUIET, 'q', "quiet", "print errors only") \
  X(VERBOSE, 'v', "verbose", "log clients; given twice: every request") \
  X(STATS, 0, "stats", "print totals as JSON at exit (on SIGUSR1 always)") \
  X(JSON, 0, "json", "print a command's output as JSON") \
  X(WITHOUT, 0, "without LIST", "hide features from clients (see README)") \
  X(FAULT, 0, "fault CMD:ERR:RATE", "make requests fail: write:EIO:0.1") \
  X(DELAY, 0, "delay CMD:MS", "make requests wait: read:50 (see README)") \
  X(DRY_RUN, 'n', "dry-run", "rollback, resize, rm: only check if possible") \
  X(ACCEPT_LOSS, 0, "accept-loss", "repair: give up what cannot be read") \
  X(NO_VERIFY, 0, "no-verify", "do not check a store's blocks when reading") \
  X(VERSION, 'V', "version", "print the version and what it was built with") \
  X(HELP, 'h', "help", "print this text")

#define CLI_OPTION_ID(id, ...) OPT_##id,
#define CLI_OPTION_ROW(id, ...) [OPT_##id] = {__VA_ARGS__, .given = 0},
#define BIT(id) (UINT64_C(1) << OPT_##id)

enum cli_option_id { CLI_OPTIONS(CLI_OPTION_ID) OPT_COUNT };

static struct cli_option opt[OPT_COUNT] = {CLI_OPTIONS(CLI_OPTION_ROW)};

/* clang-format on */

STATIC_ASSERT(options_have_a_bit_each, OPT_COUNT <= 64);

/* The name of an option, without what it takes, for "%.*s" in a message */
#define CLI_NAME_LEN(id) strcspn(opt[id].name, " ")
#define CLI_NAME(id) (int)CLI_NAME_LEN(id), opt[id].name

/* ---- State --------------------------------------------------------------- */

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
  /* How many listening sockets were passed to us, from descriptor 3 on */
  int passed;
  /* "": there is nowhere to connect to, or whoever passed us a socket knows.
   * It has room for the longest name and path, with each byte as %XX. */
  char uri[3 * WIRE_STRING_MAX + 1024];

  /* ---- --connect: the kernel's device that a target is the disk of */

  /* Whose it is: the target */
  char owner[OS_NBD_OWNER]; /* of a path only the first 1,900 bytes */
  /* The kernel has a socket, or is about to get it.  Whoever sees that this is
   * over writes 0; the signal handler reads it. */
  volatile sig_atomic_t is_connected;
  /* When cli_disconnect last refused, in os_now_ms, or 0.  Signals within half
   * a second of that count as the same one. */
  int64_t refused_ms;

  /* ---- What has to be removed at exit */

  /* The directory of the private socket, or "".  It is short because the path
   * of a socket is limited to about a hundred bytes. */
  char private_dir[90];
  /* The pidfile that we have made, open; 0: we have not. */
  int pidfile;
  /* A new file while it has another name than its own, or ""; and its own name.
   * There is room for a name that the system finds too long. */
  char temp[PATH_MAX + 300];
  const char *path;

  /* ---- The store that is served, or that a command is for; one at most */

  /* Its path, without symbolic links, or "" */
  char store[PATH_MAX];
  /* The store; NULL: it is not open. */
  struct nbdserve_cas *cas;
  /* The path of the socket that takes commands, STORE.ctl */
  char ctl_path[PATH_MAX + 4];
  /* That socket, listening, or -errno, or 0: there is none; and its file, as we
   * have made it, or all zero */
  int ctl;
  struct stat ctl_st;
  /* Guarded by server->lock: how many threads do commands, or are cli_control
   * or cli_serve_kernel; and how many of the commands are long */
  int njobs;
  int nlong;

  /* --fork: the pipe to our parent, which waits for a byte; or -1 */
  int ready_pipe;

  /* ---- What the signal handler writes.  Others read it, and write to it only
   * while the signals are blocked, with two exceptions.  stats_wanted is
   * cleared before the totals are printed: a signal that comes in between gets
   * them printed again.  cli_disconnect takes the end back when the device is
   * in use; signals that come meanwhile are one with the signal that asked for
   * it. */

  /* SIGUSR1 has come. */
  volatile sig_atomic_t stats_wanted;
  /* SIGTERM, SIGINT or SIGHUP has come; and when first, in os_now_ms, which
   * nobody but the handler looks at.  If a command runs it was told then. */
  volatile sig_atomic_t end_wanted;
  int64_t end_wanted_ms;
  /* It is time for nbdserve_stop, which the handler has called, or for
   * cli_disconnect before that. */
  volatile sig_atomic_t stopping;
  /* The process id of the command while it runs; 0: there is none.  As long as
   * this is set the process exists, though it may have ended: nobody else waits
   * for it, so its id cannot become that of another process. */
  volatile sig_atomic_t child;
  /* The exit status of a command that has ended */
  volatile sig_atomic_t child_status;
} cli = {.export_name = "", .client = -1, .ready_pipe = -1};

STATIC_ASSERT(a_process_id_fits, sizeof(sig_atomic_t) >= sizeof(pid_t));

/* ---- Messages ----------------------------------------------------------- */

/* A number in a format */
#define CLI_N "%" PRIu64

/* Prints a message to a descriptor: a line in one write, so that the lines of
 * several threads do not mix.  The form is "OBJECT: what is wrong: reason (what
 * to do)", or that as the "error" of a JSON object.  What is too long for one
 * write is cut.  The descriptor may be a pipe that nobody reads, or a client's:
 * after a second the message is lost. */
static void OS_PRINTF(3, 4) cli_say_to(int fd, int json, const char *fmt, ...) {
  char text[PATH_MAX - 30];
  char line[PATH_MAX];
  struct pollfd p = {fd, POLLOUT, 0};
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(text, sizeof text / (json ? 2 : 1), fmt, ap); /* room for '\\' */
  va_end(ap);
  char *to = stpcpy(line, json ? "{\"error\":\"" : "nbdserve: ");
  for (char *c = text; *c && json; c += u_utf8_len(c))
    if (!u_utf8_len(c)) *c = '?';
  for (const char *c = text; *c; c++) {
    if (json && (*c == '"' || *c == '\\')) *to++ = '\\';
    *to++ = *c;
  }
  strcpy(to, json ? "\"}\n" : "\n");
  if (poll(&p, 1, 1000) > 0) (void)!write(fd, line, strlen(line));
}
#define cli_say(...) cli_say_to(2, opt[OPT_JSON].given > 0, __VA_ARGS__)

/* Writes a time, in seconds since 1970, as 2026-11-29T01:02:03Z.  It may come
 * from a file that anybody may have made: it may lie behind all years. */
static const char *cli_spell_time(time_t when, char text[40]) {
  struct tm tm;
  if (!gmtime_r(&when, &tm)) tm = (struct tm){.tm_mday = 1};
  strftime(text, 40, "%Y-%m-%dT%H:%M:%SZ", &tm);
  return text;
}

/* The `log` function of the server: it filters by level, so that all that comes
 * here is to be printed.  In a file a line needs its time; a terminal shows it
 * at once, and systemd's journal knows it. */
static void cli_log(void *unused, int level, const char *message) {
  char now[40];
  (void)unused;
  (void)level;
  cli_spell_time(time(NULL), now);
  if (isatty(2) || getenv("JOURNAL_STREAM")) *now = '\0';
  cli_say("%s%s%s", now, *now ? " " : "", message);
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
  if (err == -EBUSY)
    cli_die(CLI_IN_USE, "%s: in use by a server; stop or use it", object);
  if (err) cli_failed("%s: %s", object, strerror(-err));
}

/* ---- Signals, and how it ends --------------------------------------------
 * SIGTERM, SIGINT and SIGHUP ask for the end.  If a command is being served
 * (--run, or what stands behind "--") the end comes in this order:
 *
 *   1. The command is told, by SIGTERM, and served until it has ended.  It may
 *      still write what it has, and flush.
 *   2. Nobody new can connect: nbdserve_unlisten.  (Built without threads that
 *      may come later, but nobody is accepted meanwhile.)
 *   3. The command's end, a second signal or ten seconds finish that:
 *      nbdserve_stop.
 *   4. The server finishes in its own order: see srv_finish in [13].
 *   5. The status of the command becomes ours.  If it has still not ended a
 *      message says so, and it is left alone.
 *
 * Without a command the first signal leads to nbdserve_stop and step 4.  When
 * nbdserve_stop has been called and a signal has come before, SIGINT ends the
 * process at once: whoever types Ctrl-C twice does not want to wait.
 *
 * Who does what: the signal handler, which runs in the main thread (all others
 * block the signals), does steps 1 and 3, and waits for the command.  So it
 * works, too, where nbdserve_run does not return while it serves a client.
 * Then it interrupts nbdserve_run by nbdserve_wake, and cli_serve, around that,
 * does the rest. */

/* Translates what waitpid says into an exit status, as a shell does. */
static int cli_exit_status(int wait_status) {
  assert(WIFSIGNALED(wait_status) || WIFEXITED(wait_status));
  if (WIFSIGNALED(wait_status)) return CLI_BY_SIGNAL + WTERMSIG(wait_status);
  return WEXITSTATUS(wait_status);
}

/* The signal handler.  It calls nothing but what POSIX and nbdserve.h allow in
 * a handler.  All other signals are blocked meanwhile (cli_catch_signals), so
 * that what it does to `cli` is done in one piece.  It may run before there is
 * a command, and after there was one, but never before there is a server.
 *
 * SIGCHLD comes for other reasons, too: the command was suspended, or a process
 * has ended that was started by whatever program this process was before exec.
 * Only the command is waited for, so such children are left alone.  SIGALRM of
 * somebody else means nothing.
 *
 * Signals for the end that come within half a second are one: a terminal that
 * is closed and a supervisor may both send theirs.  A SIGINT of the terminal
 * goes to the command as well, so it may well have ended already. */
static void cli_on_signal(int sig) {
  int saved = errno;
  int wait_status = 0;
  int stops = 0;
  pid_t child = (pid_t)cli.child;
  assert(cli.server && child >= 0); /* kill could hit a group of processes */
  if (sig == SIGUSR1) {
    cli.stats_wanted = 1;
  } else if (sig == SIGCHLD) {
    stops = child && waitpid(child, &wait_status, WNOHANG) == child;
    if (stops) cli.child_status = cli_exit_status(wait_status);
    if (stops) cli.child = 0;
  } else if (cli.end_wanted) {
    stops = !child || os_now_ms() - cli.end_wanted_ms > 500;
    if (!child && cli.stopping && sig == SIGINT) _exit(CLI_BY_SIGNAL + sig);
  } else if (sig != SIGALRM) {
    cli.end_wanted = 1;
    cli.end_wanted_ms = os_now_ms();
    stops = !child;
    if (child) kill(child, SIGTERM);
    if (child) alarm(10); /* no more than whoever sent the signal will wait */
  }
  if (stops) cli.stopping = 1;
  if (stops && !cli.is_connected) nbdserve_stop(cli.server);
  nbdserve_wake(cli.server);
  errno = saved;
}

/* Gives our signals a handler, or SIG_IGN when the process ends, or SIG_DFL for
 * a program that is to be executed.  SIGHUP and SIGINT stay ignored if whoever
 * started us wants it so, as nohup does, and a shell for what it runs in the
 * background.  SIGPIPE and SIGXFSZ are ignored, so that writing to a closed
 * pipe, or beyond the limit for the size of files, becomes an error; but not
 * for such a program, which inherits what is ignored.  Then no signal is
 * blocked: who started us may have blocked some, without which we would not
 * learn of a command's end. */
static void cli_catch_signals(void (*handler)(int)) {
  static const int signals[] = {SIGHUP,  SIGINT,  SIGTERM, SIGUSR1,
                                SIGCHLD, SIGALRM, SIGPIPE, SIGXFSZ};
  struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
  struct sigaction was;
  sigfillset(&action.sa_mask);
  for (size_t i = 0; i < COUNT_OF(signals); i++) {
    int sig = signals[i];
    sigaction(sig, NULL, &was);
    if (sig == SIGPIPE && handler != SIG_DFL) action.sa_handler = SIG_IGN;
    if (was.sa_handler != SIG_IGN || (sig != SIGHUP && sig != SIGINT))
      sigaction(sig, &action, NULL);
  }
  sigprocmask(SIG_UNBLOCK, &action.sa_mask, NULL); /* all of them */
}

/* ---- Files that we make and remove -------------------------------------- */

/* Makes a new file that will be at path when it is whole: whoever sees it there
 * can rely on it, and one that was there before stays until then.  Meanwhile it
 * has another name beside it; cli_close removes it if it comes to nothing.
 * O_EXCL neither follows symbolic links nor opens a file that is there.  The
 * new file gets the mode of the old one or, if that is NULL, the one that the
 * umask asks for.  Returns the descriptor, which stays open. */
static int cli_new_file(const char *path, const struct stat *old) {
  const char *slash = strrchr(path, '/');
  int dir = slash ? (int)(slash - path) + 1 : 0;
  assert(!*cli.temp);
  cli.path = path;
  snprintf(cli.temp, sizeof cli.temp, "%.*s.%.200s.nbdserve-%lx-%" PRIx64, dir,
           path, path + dir, (unsigned long)getpid(), (uint64_t)os_now_ms());
  int fd = open(cli.temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd < 0) *cli.temp = '\0';
  if (fd < 0 || (old && fchmod(fd, old->st_mode & 0777) < 0))
    cli_exit_if_error(-errno, path);
  return fd;
}

/* Gives the new file its own name. */
static void cli_put_new_file(void) {
  assert(*cli.temp && cli.path);
  if (rename(cli.temp, cli.path) < 0) cli_exit_if_error(-errno, cli.path);
  *cli.temp = '\0';
}

/* Is the file at path a store?  Whoever writes to it would destroy it.  One
 * superblock is enough to tell: the other, 1 MiB away, may be damaged. */
static int cli_is_store(const char *path) {
  char begin[2][sizeof "NBDSCAS"] = {"", ""};
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
  for (int i = 0; i < 2; i++)
    (void)!pread(fd, begin[i], sizeof *begin - 1, i << 20);
  close(fd); /* with -1 all this does nothing */
  return strcmp(begin[0], "NBDSCAS") == 0 || strcmp(begin[1], "NBDSCAS") == 0;
}

/* ---- What --fault and --delay do to requests ---------------------------- */

/* The types of requests are below this; NBD_CMD_BLOCK_STATUS is the last.  As a
 * type it stands for each of them. */
#define CLI_NTYPES (NBD_CMD_BLOCK_STATUS + 1)

/* What --fault and --delay do to the requests of a type, which is fixed before
 * the server is made, and what --stats tells of them.  The counters are guarded
 * by server->lock. */
static struct cli_requests {
  /* The answer to requests that fail, -errno */
  int err;
  /* How many of a million requests fail */
  unsigned rate_ppm;
  /* Each request adds rate_ppm; where that makes a million the request fails,
   * and the million is taken off. */
  unsigned sum;
  /* How long each request waits before it is done */
  int delay_ms;
  /* How many have succeeded so far, and how long they have taken */
  uint64_t succeeded;
  uint64_t total_ns;
  uint64_t max_ns;
} cli_requests[CLI_NTYPES];

/* The `before` function of the server: it is called for each request, in the
 * thread that is about to do it, and may wait there.  Which requests fail is
 * not left to chance: tests can rely on the number. */
static int cli_before(void *unused, unsigned type, uint64_t off, uint64_t len) {
  (void)unused;
  assert(type < CLI_NTYPES);
  struct cli_requests *fault = &cli_requests[type];
  if (fault->delay_ms) poll(NULL, 0, fault->delay_ms);
  os_lock(&cli.server->lock);
  fault->sum += fault->rate_ppm;
  int fails = fault->sum >= 1000000;
  if (fails) fault->sum -= 1000000;
  assert(fault->sum < 1000000);
  os_unlock(&cli.server->lock);
  if (fails)
    u_log(&cli.server->config, NBDSERVE_LOG_TRACE,
          "%s off=" CLI_N " len=" CLI_N ": --fault makes it fail",
          wire_cmd(type)->name, off, len);
  return fails ? fault->err : 0;
}

/* The `after` function of the server. */
static void cli_after(void *unused, unsigned type, uint64_t off, uint64_t len,
                      int err, uint64_t ns) {
  (void)unused;
  (void)off;
  (void)len;
  if (type >= CLI_NTYPES || err) return;
  struct cli_requests *done = &cli_requests[type];
  os_lock(&cli.server->lock);
  done->succeeded++;
  done->total_ns += ns;
  if (ns > done->max_ns) done->max_ns = ns;
  os_unlock(&cli.server->lock);
}

/* ---- What options may say ----------------------------------------------- */

/* clang-format off */

/* A word that the value of an option may contain, and what it stands for.  In a
 * table of words the last name is NULL. */
struct cli_word {
  const char *name;
  uint32_t value;
};

/* --without: bits of nbdserve_config.without, where flags of the transmission
 * stand for themselves, and option N of the handshake for bit 16 + N */
static const struct cli_word cli_features[] = {
    {"flush", NBD_FLAG_SEND_FLUSH},     {"fua", NBD_FLAG_SEND_FUA},
    {"trim", NBD_FLAG_SEND_TRIM},       {"zero", NBD_FLAG_SEND_WRITE_ZEROES},
    {"df", NBD_FLAG_SEND_DF},           {"multi-conn", NBD_FLAG_CAN_MULTI_CONN},
    {"cache", NBD_FLAG_SEND_CACHE},     {"fast-zero", NBD_FLAG_SEND_FAST_ZERO},
    {"list", 65536u << NBD_OPT_LIST},   {"info", 65536u << NBD_OPT_INFO},
    {"go", 65536u << NBD_OPT_GO},
    {"structured", 65536u << NBD_OPT_STRUCTURED_REPLY},
    {"list-meta", 65536u << NBD_OPT_LIST_META_CONTEXT},
    {"meta", 65536u << NBD_OPT_SET_META_CONTEXT},
    {"extended", 65536u << NBD_OPT_EXTENDED_HEADERS}, {NULL, 0}};

/* --fault and --delay: the requests that they concern */
static const struct cli_word cli_types[] = {
    {"read", NBD_CMD_READ},             {"write", NBD_CMD_WRITE},
    {"flush", NBD_CMD_FLUSH},           {"trim", NBD_CMD_TRIM},
    {"cache", NBD_CMD_CACHE},           {"zero", NBD_CMD_WRITE_ZEROES},
    {"status", NBD_CMD_BLOCK_STATUS},   {"all", CLI_NTYPES}, {NULL, 0}};

/* --fault: the errors that the protocol knows, as errno values */
static const struct cli_word cli_errors[] = {
    {"EPERM", EPERM},                   {"EIO", EIO},
    {"ENOMEM", ENOMEM},                 {"EINVAL", EINVAL},
    {"ENOSPC", ENOSPC},                 {"EOVERFLOW", EOVERFLOW},
    {"ENOTSUP", ENOTSUP},               {"ESHUTDOWN", ESHUTDOWN}, {NULL, 0}};

/* --cache: flags of an export */
static const struct cli_word cli_caches[] = {
    {"writeback", 0}, {"writethrough", NBDSERVE_EXPORT_WRITETHROUGH},
    {"unsafe", NBDSERVE_EXPORT_UNSAFE}, {NULL, 0}};

/* --sandbox: try it, do not, or fail where it cannot be had */
enum { SANDBOX_AUTO, SANDBOX_OFF, SANDBOX_REQUIRE };
static const struct cli_word cli_sandbox_modes[] = {
    {"auto", SANDBOX_AUTO},             {"off", SANDBOX_OFF},
    {"require", SANDBOX_REQUIRE},       {NULL, 0}};

/* clang-format on */

/* What all exports have in common: the sizes, flags and contexts that
 * --block-size, --cache and --changes say */
static struct nbdserve_export cli_common;

/* --changes: the only metadata context of volumes, besides base:allocation */
static char cli_context[200];
static const char *const cli_contexts[] = {cli_context, NULL};

/* ---- From argv to `opt` ---- */

/* Takes a word off the front of *text, the value of an option, and returns what
 * it stands for.  The word goes to a colon or comma, which is taken off, too,
 * or to the end of the text.  A word that is not in the table ends the
 * process. */
static uint32_t cli_take_word(enum cli_option_id id, const char **text,
                              const struct cli_word *word) {
  size_t len = strcspn(*text, ":,");
  char all[200] = "";
  for (; word->name; word++) {
    if (strncmp(word->name, *text, len) == 0 && !word->name[len]) break;
    strcat(strcat(all, " "), word->name);
    assert(strlen(all) + 20 < sizeof all);
  }
  if (!word->name)
    cli_usage("--%.*s %s: not one of:%s", CLI_NAME(id), opt[id].text, all);
  *text += len + ((*text)[len] != '\0');
  return word->value;
}

/* --block-size: three sizes.  Whether they go together is for nbdserve_add to
 * say.  False: it is no such value. */
static int cli_parse_sizes(const char *value) {
  uint32_t *const sizes[] = {&cli_common.min_block, &cli_common.preferred_block,
                             &cli_common.max_request};
  uint64_t size = 0;
  for (int i = 0; i < 3; i++) {
    value = u_parse_size(value, &size);
    if (!value || size < 1 || size > UINT32_MAX) return 0;
    if (*value++ != (i < 2 ? ':' : '\0')) return 0;
    *sizes[i] = (uint32_t)size;
  }
  return 1;
}

/* --fault: which requests fail, how, and at what rate; --delay: which requests
 * wait, and how many milliseconds.  The number may have a decimal point, and is
 * rounded up: of what is above 0 something happens some time.  NaN is refused,
 * as it fails the comparisons.  False: it is no such value. */
static int cli_parse_fault(enum cli_option_id id, const char *value) {
  int is_fault = id == OPT_FAULT;
  uint32_t type = cli_take_word(id, &value, cli_types);
  uint32_t error = is_fault ? cli_take_word(id, &value, cli_errors) : 0;
  char *rest;
  double number = strtod(value, &rest);
  int is_good = number >= 0 && number <= (is_fault ? 1 : 1e6);
  if (!is_good || rest == value || *rest) return 0;
  for (uint32_t i = 0; i < CLI_NTYPES; i++) {
    if (type != i && type != CLI_NTYPES) continue;
    if (is_fault) cli_requests[i].err = -(int)error;
    if (is_fault) cli_requests[i].rate_ppm = (unsigned)(number * 1e6 + .999);
    if (!is_fault) cli_requests[i].delay_ms = (int)(number + .999);
  }
  return 1;
}

/* Notes that an option was given, and checks its value; one that is not allowed
 * ends the process.  A descriptor has to be open: a number that is free would
 * later be that of a file of our own, maybe of an image. */
static void cli_set_option(enum cli_option_id id, const char *value) {
  struct cli_option *o = &opt[id];
  uint64_t *n = &o->number;
  size_t size;
  assert(id < OPT_COUNT && o->min <= o->max);
  assert(!o->max || value);
  o->given++;
  o->text = value;
  if (o->max && (!u_parse_number(value, o->max, n) || *n < o->min))
    cli_usage("--%.*s %s: not a number from " CLI_N " to " CLI_N, CLI_NAME(id),
              value, o->min, o->max);
  if ((id == OPT_FD || id == OPT_READY_FD) && fcntl((int)*n, F_GETFD) < 0)
    cli_usage("--%.*s %s: not open", CLI_NAME(id), value);
  if (id == OPT_CACHE) cli_common.flags = cli_take_word(id, &value, cli_caches);
  if (id == OPT_CONNECT && (strncmp(value, "/dev/nbd", 8) != 0 ||
                            !u_parse_number(value + 8, 65535, n)))
    cli_usage("--connect %s: not /dev/nbd and a number", value);
  if (id == OPT_SANDBOX) *n = cli_take_word(id, &value, cli_sandbox_modes);
  if (id == OPT_CHANGES) {
    snprintf(cli_context, sizeof cli_context, "qemu:dirty-bitmap:%s", value);
    cli_common.contexts = cli_contexts;
    if (!ex_are_contexts(cli_contexts, &size))
      cli_usage("--changes %s: no snapshot can be called so", value);
  }
  while (id == OPT_WITHOUT && *value)
    *n |= cli_take_word(id, &value, cli_features);
  if ((id == OPT_BLOCK_SIZE && !cli_parse_sizes(value)) ||
      ((id == OPT_FAULT || id == OPT_DELAY) && !cli_parse_fault(id, value)) ||
      ((id == OPT_CACHE || id == OPT_SANDBOX) && *value)) /* a second word */
    cli_usage("--%.*s %s: not as in --%s: %s", CLI_NAME(id), o->text, o->name,
              o->help);
}

/* Parses the command line.  A word is a target, which may stand between
 * options; --NAME or --NAME=VALUE; or letters behind "-", of which the first
 * that takes a value ends it: the rest of the word is the value.  If that is
 * empty, or "=VALUE" is missing, the value is the next word.  Names have to be
 * written in full: a shorthand that is unique today would not be so for ever.
 *
 * Targets are gathered at the front of argv, over words that have been parsed:
 * there is at least one such word, the name of the program, so they never reach
 * one that has not. */
static void cli_parse(char **argv) {
  cli.targets = argv;
  for (char **word = argv + 1; *word && !cli.command; word++) {
    int is_long = strncmp(*word, "--", 2) == 0;
    /* What is left of the word; nothing is left of a target. */
    const char *p = **word == '-' ? *word + 1 + is_long : "";
    const char *value = NULL;
    assert(cli.targets + cli.ntargets < word);
    if (!*p && is_long) cli.command = word + 1;
    if (!*p && !is_long) cli.targets[cli.ntargets++] = *word;
    while (*p && !value) {
      size_t len = is_long ? strcspn(p, "=") : 1;
      enum cli_option_id id = 0;
      for (; id < OPT_COUNT; id++)
        if (is_long ? len == CLI_NAME_LEN(id) && !strncmp(opt[id].name, p, len)
                    : opt[id].letter == *p)
          break;
      if (id == OPT_COUNT) cli_usage("%s: unknown option (try --help)", *word);
      int takes_value = strchr(opt[id].name, ' ') != NULL;
      p += len;
      if (takes_value) value = *p ? p + is_long : *++word;
      if (takes_value ? !value : is_long && *p)
        cli_usage("--%s: %s", opt[id].name,
                  takes_value ? "lacks its value" : "takes no value");
      cli_set_option(id, value);
    }
  }
  if (cli.command) opt[OPT_RUN].given++;
}

/* Refuses an option together with one of the others, a BIT for each. */
static void cli_exclude(int id, uint64_t others, const char *why) {
  for (int other = 0; other < OPT_COUNT; other++)
    if (opt[id].given && opt[other].given && others >> other & 1)
      cli_usage("--%s: not together with --%s: %s", opt[id].name,
                opt[other].name, why);
}

/* Refuses options, a BIT for each: to ignore one would not be what the user has
 * asked for. */
static void cli_refuse(uint64_t options, const char *why, const char *what) {
  for (int id = 0; id < OPT_COUNT; id++)
    if (opt[id].given && options >> id & 1)
      cli_usage("--%.*s: %s %s", CLI_NAME(id), why, what);
}

/* Refuses what makes no sense for a server.  Commands on stores come before
 * that, and refuse all but cli_options_of. */
static void cli_check_options(void) {
  const uint64_t sockets = BIT(UNIX) | BIT(PORT) | BIT(BIND);
  cli_exclude(OPT_STDIN, sockets | BIT(FD), "nobody listens");
  cli_exclude(OPT_FD, sockets, "the socket is there already");
  cli_exclude(OPT_RUN, BIT(STDIN) | BIT(FD), "the command could not connect");
  cli_exclude(OPT_RUN, BIT(ONCE) | BIT(IDLE_EXIT), "it ends with the command");
  cli_exclude(OPT_FORK, BIT(STDIN) | BIT(RUN), "nobody would wait for it");
  cli_exclude(OPT_FORK, BIT(PARENT), "the parent ends at once");
  cli_exclude(OPT_CREATE, BIT(READ_ONLY) | BIT(TEMPORARY), "it stays empty");
  cli_exclude(OPT_TEMPORARY, BIT(READ_ONLY), "nothing to discard");
  cli_exclude(OPT_CONNECT, BIT(STDIN) | BIT(FD), "the kernel is the client");
  cli_exclude(OPT_CONNECT, BIT(ONCE) | BIT(IDLE_EXIT),
              "it ends with the device");
  if (opt[OPT_SANDBOX].number == SANDBOX_REQUIRE)
    cli_exclude(OPT_SANDBOX, BIT(CONNECT), "it opens the device again");
  if (opt[OPT_RUN].given > 1 || (cli.command && !*cli.command))
    cli_usage("--: there must be one command, behind it or --run");
  cli_refuse(BIT(DRY_RUN) | BIT(ACCEPT_LOSS), "only for", "commands on stores");
  if (!cli.ntargets) cli_usage("no target (try --help)");
  if (opt[OPT_EXPORT].text && cli.ntargets > 1)
    cli_usage("--export: for a single target (use NAME=TARGET)");
}

/* Ends what was printed by stdio.  Returns the exit status. */
static int cli_end_output(void) {
  if (fflush(stdout) == EOF || ferror(stdout))
    cli_failed("standard output: not all could be written");
  return 0;
}

/* Prints what --help says about an option.  Those without a letter are
 * indented, so that all names are in one column. */
static void cli_help_option(int id) {
  const struct cli_option *o = &opt[id];
  const char letter[] = {'-', o->letter, ',', '\0'};
  printf("  %3s --%-19s %s\n", o->letter ? letter : "", o->name, o->help);
}

/* Adds to the numbers of threads and of long commands, and returns how many
 * long ones there are then.  Whoever waits for the end is woken. */
static int cli_count(int jobs, int longs) {
  os_lock(&cli.server->lock);
  cli.njobs += jobs;
  int nlong = cli.nlong += longs;
  assert(cli.njobs >= 0 && nlong >= 0);
  os_wake_all(&cli.server->lock);
  os_unlock(&cli.server->lock);
  return nlong;
}

/* ---- Commands on stores ----------------------------------------------------
 * A store can be open in one process only, and that process does the command.
 * Usually it is us: the store is opened, the command done, and that is all.  If
 * opening it fails with EBUSY it is being served, and the server does it:
 *
 *   us                        the server
 *   connect to STORE.ctl  ->  cli_control accepts, starts a thread for it
 *   the request,
 *   its descriptors,
 *   the operands          ->  cli_serve_job: cli_run_job, with its output and
 *                             its messages going straight to these descriptors
 *   exit with the status  <-  a byte: the exit status
 *
 * The descriptors are where the output goes (or the FILE of import and export,
 * which only we may be allowed to open) and our standard error.  If we are gone
 * before the command is done, the server sees that and ends it (cli_wait).
 * Both are processes of one machine and one version of nbdserve, so the request
 * is sent as it lies in memory.  STORE.ctl belongs to the owner of the store
 * and is nobody else's to connect to.
 *
 * Each command has a thread of its own, so none waits for another one, nor for
 * output that nobody takes, nor for a client that says nothing.  Of those that
 * may take long a server does 16 at a time and refuses more; the
 * others are a checkpoint each, and are never refused.  Built without threads
 * it takes no commands. */
#if !NBDSERVE_NO_CAS

enum cli_verb_flags {
  /* It knows --dry-run.  The others refuse that option: they would change the
   * store all the same. */
  VERB_DRY_RUN = 1 << 0,
  /* Its last operand is a size. */
  VERB_SIZE = 1 << 1,
  /* It may take long, and leaves nothing half done when a signal ends it. */
  VERB_LONG = 1 << 2,
  /* Its last operand is a FILE that it reads. */
  VERB_READS_FILE = 1 << 3,
  /* Its last operand is a FILE that it writes; "-" is standard output. */
  VERB_WRITES_FILE = 1 << 4,
  /* It prints any number of rows, as JSON: an array of objects.  The others
   * print one or none. */
  VERB_ROWS = 1 << 5,
  /* It gives a new name to something: each operand but the first. */
  VERB_NEW_NAME = 1 << 6,
  /* It may talk to another server: its last operand is the URI of that or, with
   * a command behind "--" that speaks NBD on its standard streams, a name.
   * Built without a client no command may. */
  VERB_PEER = NBDSERVE_NO_CLIENT ? 0 : 1 << 7
};

/* The upper bits change when the request does, or its descriptors: also between
 * two versions, while the next one is being made. */
#define CLI_VERSION (0xC0000000u | NBDSERVE_VERSION_NUMBER)

/* A command while it is being done, by whichever process */
struct cli_job {
  /* ---- What is to be done; fixed.  The texts are in `operands`. */
  const struct cli_verb *verb;
  /* What goes over the control socket, with the operands behind it.  The
   * receiver believes nothing of it: see cli_receive. */
  struct {
    /* Of the program: one of another version is not understood.  Where versions
     * before 0.6 look for the length this is one that they refuse. */
    uint32_t version;
    /* Bytes of the operands, each of which NUL ends */
    uint32_t length;
    /* The command: an index of cli_verbs */
    unsigned char verb;
    /* --json and --dry-run */
    unsigned char json;
    unsigned char dry_run;
    /* There is a peer. */
    unsigned char peer;
  } request;
  char *operands;
  /* At least one.  Commands that change nothing have their operands in the name
   * and `to` of the first. */
  struct nbdserve_cas_op *ops;
  size_t nops;
  /* Where it writes to */
  struct {
    /* Rows.  For import and export: the FILE; for serve: what the client
     * gets. */
    int output;
    /* Messages and progress */
    int messages;
    /* A socket to a peer; for serve: what the client sends; else any that is
     * open */
    int in;
  } fds;
  /* The connection between server and client, for both; else -1 */
  int client;

  /* ---- Its output and progress so far; times are in os_now_ms */
  unsigned nrows;
  /* -errno, if something could not be printed */
  int lost;
  /* Which of the ops has failed */
  size_t failed;
  /* The server that the streams lead to */
  struct nbdserve_peer peer;
  int64_t begun_ms;
  /* When progress was last shown; 0: none is on the screen. */
  int64_t shown_ms;
};

struct cli_verb {
  const char *name;
  /* The operands, as --help and the usage message print them */
  const char *operands;
  const char *help;
  /* Does the command on an open store.  Returns 0 or -errno.  Only `init` has
   * none, as there is no store yet. */
  int (*run)(struct cli_job *job);
  /* How many operands it needs besides STORE, and how many it may get.  It is
   * done for each one or, if it needs two, for the first with each of the
   * others, all at once: see cli_split_operands. */
  int min;
  int max;
  /* VERB_DRY_RUN... */
  unsigned flags;
  /* How the store is opened for it: NBDSERVE_CAS_READONLY, to let other readers
   * in, or NBDSERVE_CAS_REPAIR */
  uint32_t open;
  /* For cli_do_change: NBDSERVE_CAS_CREATE... */
  int change;
};

/* ---- Output ------------------------------------------------------------- */

/* Waits until a descriptor (-1: none) takes output (POLLOUT) or has input
 * (POLLIN), for ms milliseconds (-1: without limit).  -ECANCELED: the job has
 * to end, as the server stops, a signal has come, or the other side of the
 * connection has gone (or answered, if that is the server).  -ETIMEDOUT. */
static int cli_wait(const struct cli_job *job, int fd, short events, int ms) {
  struct pollfd p[] = {{fd, events, 0},
                       {cli.server->stop[0], POLLIN, 0},
                       {job->client, POLLIN, 0}}; /* -1 is skipped */
  while (poll(p, COUNT_OF(p), ms) < 0 && errno == EINTR)
    continue;
  if (p[1].revents || p[2].revents) return -ECANCELED;
  return p[0].revents ? 0 : -ETIMEDOUT;
}

/* Reads (POLLIN) or writes (POLLOUT) *n bytes, and sets *n to their number:
 * fewer at the end of what is read.  The descriptor may be anything and is the
 * client's, so it stays as it is: what has no offsets, like a pipe, takes
 * PIPE_BUF bytes without blocking if poll() calls it ready.  Returns 0 or
 * -errno: that of cli_wait if nobody takes it for --stall seconds (above 24
 * days ms is negative: for ever). */
static int cli_move(const struct cli_job *job, int fd, short events,
                    unsigned char *buf, uint64_t *n) {
  int writes = events == POLLOUT;
  int ms = writes ? (int)cli.server->config.stall_ms : -1;
  size_t most = writes && lseek(fd, 0, SEEK_CUR) < 0 ? PIPE_BUF : IO_UNIT;
  uint64_t wanted = *n;
  for (*n = 0; *n < wanted;) {
    int err = cli_wait(job, fd, events, ms);
    if (err) return err;
    size_t len = (size_t)u_min(wanted - *n, most);
    ssize_t some = writes ? write(fd, buf + *n, len) : read(fd, buf + *n, len);
    if (some == 0 && !writes) break;
    if (some < 0 && errno != EINTR && errno != EAGAIN) return -errno;
    if (some > 0) *n += (uint64_t)some;
    assert(*n <= wanted);
  }
  return 0;
}

/* Writes n bytes. */
static int cli_write(const struct cli_job *job, int fd, const void *data,
                     uint64_t n) {
  return cli_move(job, fd, POLLOUT, (unsigned char *)(uintptr_t)data, &n);
}

/* Clears the line that shows the progress, if there is one, so that a row or a
 * message can take its place. */
static void cli_hide_progress(struct cli_job *job) {
  if (job->shown_ms &&
      cli_wait(job, job->fds.messages, POLLOUT, 0) != -ETIMEDOUT)
    dprintf(job->fds.messages, "\r    \r");
  job->shown_ms = 0;
}

/* Is called now and then by what takes long: an nbdserve_progress_fn.  After a
 * second, and ten times a second, shows on a terminal how much is done.
 * Returns true if the command has to end. */
static int cli_progress(void *arg, uint64_t done, uint64_t total) {
  struct cli_job *job = arg;
  int64_t now = os_now_ms();
  int err = cli_wait(job, job->fds.messages, POLLOUT, 0);
  if (!err && done && now - job->begun_ms > 1000 && now - job->shown_ms > 100 &&
      isatty(job->fds.messages)) {
    job->shown_ms = now;
    dprintf(job->fds.messages, "\r%3d%%\r", (int)(done / (total / 100 + 1)));
  }
  return job->lost || err == -ECANCELED;
}

/* Prints a row of values, in one piece: by the format `text` with tabs between
 * them, or by `json`, which has the same values.  JSON would want nothing in a
 * text escaped: the store refuses names with such characters, and the other
 * texts are our own.  Returns 0, or -errno if it is lost, which ends a list
 * early: whoever reads a list must not take the half of it for the whole. */
static int OS_PRINTF(2, 4) OS_PRINTF(3, 4)
    cli_row(struct cli_job *job, const char *text, const char *json, ...) {
  char row[sizeof cli.uri + 64];
  int is_json = job->request.json;
  int start = is_json && job->verb->flags & VERB_ROWS ? 0 : 1;
  va_list ap;
  assert(job->verb->flags & VERB_ROWS || !job->nrows);
  row[0] = job->nrows++ ? ',' : '[';
  va_start(ap, json);
  vsnprintf(row + 1, sizeof row - 1, is_json ? json : text, ap);
  va_end(ap);
  assert(strlen(row) > 1 && strlen(row) < sizeof row - 1);
  cli_hide_progress(job);
  job->lost = cli_write(job, job->fds.output, row + start, strlen(row + start));
  return job->lost;
}

/* ---- What each command does --------------------------------------------- */

/* create, snapshot, rollback, clone, rename, resize, rm: they change the
 * catalog, and nbdserve.h has one call for all of them. */
static int cli_do_change(struct cli_job *job) {
  assert(job->verb->change);
  int err = nbdserve_cas_changes(cli.cas, job->ops, job->nops, &job->failed);
  if (err || !job->request.dry_run) return err;
  return cli_row(job, "%s: possible; nothing was changed\n",
                 "{\"possible\":\"%s\"}\n", job->verb->name);
}

/* Prints a volume or snapshot: an nbdserve_list_fn. */
static int cli_list_row(void *arg, const struct nbdserve_cas_info *info) {
  char date[40];
  return cli_row(
      arg, "%s\t" CLI_N "\t%s\t%s\t" CLI_N "\n",
      "{\"name\":\"%s\",\"size\":" CLI_N ",\"created\":\"%s\",\"id\":\"%s\""
      ",\"clients\":" CLI_N "}\n",
      info->name, info->size, cli_spell_time((time_t)info->created, date),
      info->id, (uint64_t)info->clients);
}

/* list: a row for each volume and snapshot */
static int cli_do_list(struct cli_job *job) {
  return nbdserve_cas_list(cli.cas, cli_list_row, job);
}

/* seal: gives a snapshot its id and prints that.  Until it was sealed all of it
 * has to be read, which takes long.
 *
 * pull: makes the snapshot of one that another store has, before that.  What
 * was pulled is sealed already, and is not read again. */
static int cli_do_seal(struct cli_job *job) {
  const char *name = job->ops->name;
  char id[72];
  int err = 0;
#if !NBDSERVE_NO_CLIENT
  if (job->verb->flags & VERB_PEER)
    err = nbdserve_cas_pull(cli.cas, name, job->ops->to, &job->peer);
#endif
  if (!err) err = nbdserve_cas_seal(cli.cas, name, id, cli_progress, job);
  if (err) return err;
  assert(strncmp(id, "sha256-", 7) == 0);
  return cli_row(job, "%s\n", "{\"id\":\"%s\"}\n", id);
}

/* Prints a range that differs: an nbdserve_range_fn */
static int cli_range_row(void *arg, uint64_t off, uint64_t len) {
  return cli_row(arg, CLI_N "\t" CLI_N "\n",
                 "{\"offset\":" CLI_N ",\"length\":" CLI_N "}\n", off, len);
}

/* diff: a row for each range in which two volumes or snapshots differ.  The
 * library does not say which of the names is missing: if the first one can be
 * opened, as no hidden export (with a "/"), it is the second, and the message
 * is to name that. */
static int cli_do_diff(struct cli_job *job) {
  struct nbdserve_cas_op *op = job->ops;
  struct nbdserve_export v = {.name = NULL};
  int err = nbdserve_cas_diff(cli.cas, op->name, op->to, cli_range_row, job);
  if (err != -ENOENT || strchr(op->name, '/') ||
      nbdserve_cas_volume(cli.cas, op->name, &v) != 0)
    return err;
  v.ops->close(v.ctx);
  op->name = op->to;
  return err;
}

/* Prints what is damaged: an nbdserve_damage_fn.  Damage to the store itself
 * has no name; a row then has "-" there, so that it always has four fields. */
static int cli_damage_row(void *arg, const char *name, uint64_t off,
                          uint64_t len, const char *why) {
  struct cli_job *job = arg;
  if (!*name && !job->request.json) name = "-";
  return cli_row(job, "%s\t" CLI_N "\t" CLI_N "\t%s\n",
                 "{\"name\":\"%s\",\"offset\":" CLI_N ",\"length\":" CLI_N
                 ",\"why\":\"%s\"}\n",
                 name, off, len, why);
}

/* verify: a row for each range that is damaged; the exit status tells, too.
 * repair: the same for what remains damaged. */
static int cli_do_verify(struct cli_job *job) {
  if (job->verb->open != NBDSERVE_CAS_REPAIR)
    return nbdserve_cas_verify(cli.cas, cli_damage_row, cli_progress, job);
  return nbdserve_cas_repair(cli.cas, job->request.peer ? &job->peer : NULL,
                             cli_damage_row, cli_progress, job);
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

/* Passes on a volume or snapshot: an nbdserve_list_fn */
static int cli_emit_volume(void *arg, const struct nbdserve_cas_info *info) {
  struct cli_emit *to = arg;
  if (info->partial) return 0;
  return to->emit(to->arg, info->name, info->readonly ? "snapshot" : "");
}

/* The `list` function of a server of all of a store */
static int cli_list_volumes(void *unused, nbdserve_emit_fn *emit, void *arg) {
  struct cli_emit to = {emit, arg};
  (void)unused;
  return nbdserve_cas_list(cli.cas, cli_emit_volume, &to);
}

/* serve: serves a client whose streams another process has passed on, as long
 * as that process is there.  The options of this server hold for it, but it
 * gets all of the store, even if only a volume is served. */
static int cli_do_serve(struct cli_job *job) {
  struct nbdserve_config config = cli.server->config;
  struct nbdserve *all; /* what we serve may be only a volume of the store */
  config.find = cli_find_volume;
  config.list = cli_list_volumes;
  int err = nbdserve_new(&all, &config);
  if (err) return err;
  dup2(*cli.server->stop, *all->stop); /* it stops with the other one */
  all->lifeline = job->client;
  err = nbdserve_serve(all, job->fds.in, job->fds.output, NULL);
  nbdserve_free(all);
  return err;
}

/* gc: gives unused space to the file system.  The row has the bytes of the file
 * that nothing uses. */
static int cli_do_gc(struct cli_job *job) {
  uint64_t bytes;
  int err = nbdserve_cas_gc(cli.cas, &bytes, cli_progress, job);
  if (err) return err;
  return cli_row(job, CLI_N "\n", "{\"bytes\":" CLI_N "}\n", bytes);
}

/* stat: how much is stored, and how full the log is: a line for each value */
static int cli_do_stat(struct cli_job *job) {
  struct nbdserve_cas_stat s;
  nbdserve_cas_stat(cli.cas, &s);
  assert(u_is_power_of_2(s.block_size));
  return cli_row(job,
                 "block_size\t" CLI_N "\nstored\t" CLI_N "\nfree\t" CLI_N
                 "\nfile\t" CLI_N "\nlog\t" CLI_N "\n",
                 "{\"block_size\":" CLI_N ",\"stored\":" CLI_N
                 ",\"free\":" CLI_N ",\"file\":" CLI_N ",\"log\":" CLI_N "}\n",
                 s.block_size, s.stored, s.free, s.file, s.log);
}

/* uri: where the store is served, and the server's process id.  The server runs
 * this; if the command does (client < 0), nobody serves the store.  With
 * --connect the place may be the device alone. */
static int cli_do_uri(struct cli_job *job) {
  const char *place = *cli.uri ? cli.uri : opt[OPT_CONNECT].text;
  if (job->client < 0 || !place) return -ENOTCONN;
  return cli_row(job, "%s\t" CLI_N "\n",
                 "{\"uri\":\"%s\",\"process\":" CLI_N "}\n", place,
                 (uint64_t)getpid());
}

/* Is there data at off of a volume?  *end: where that changes.  What is not
 * known is data: then reading it tells what is wrong. */
static int cli_is_data(const struct nbdserve_export *v, uint64_t off,
                       uint64_t *end) {
  unsigned char extent[WIRE_EXT_EXTENT_LEN];
  struct nbdserve_extents x = {.align = 1, .max = 1, .each = sizeof extent};
  assert(off < v->size);
  x.left = v->size - off;
  x.data = extent;
  *end = v->size;
  if (v->ops->extents(v->ctx, off, x.left, 0, &x) || !x.n) return 1;
  *end = off + x.last_len;
  assert(*end > off && *end <= v->size);
  return !(x.last_status & NBDSERVE_EXTENT_ZERO);
}

/* export: writes a volume or snapshot to a FILE, which gets its size, or to
 * standard output, behind what may be there already.  Whoever gave the command
 * makes it durable: cli_run_on_store.
 *
 * import: makes a volume of a file, or of a stream, as a pipe is: that has no
 * size, and its end becomes that of the volume.  If an import fails, at
 * whatever point, there is no volume afterwards.
 *
 * Both copy IO_UNIT bytes at a time, which is a whole number of blocks of every
 * size, from front to back.  Where can_skip is set, holes are not copied, as
 * the other side is one hole already: a new volume, or a file that can be given
 * its size.  Then the position in the file is that in the volume.  Standard
 * output is another matter: something may stand before, and it may be a
 * pipe. */
static int cli_do_copy(struct cli_job *job) {
  const uint64_t most = UINT64_C(1) << 50; /* bytes of a volume */
  struct nbdserve_export v = {.name = NULL};
  int file = job->fds.output;
  int imports = (job->verb->flags & VERB_READS_FILE) != 0;
  off_t size = imports ? lseek(file, 0, SEEK_END) : 0;
  int is_stream = size < 0;
  int can_skip = imports ? !is_stream : strcmp(job->ops->to, "-") != 0;
  int is_data = 0;
  uint64_t end = 0; /* of the data or hole that we are in */
  uint64_t n = 0;
  unsigned char *buffer = NBDSERVE_MALLOC(IO_UNIT);
  int err = imports ? nbdserve_cas_begin(cli.cas, job->ops->name,
                                         is_stream ? most : (uint64_t)size, &v)
                    : nbdserve_cas_volume(cli.cas, job->ops->name, &v);
  if (!err && !buffer) err = -ENOMEM;
  if (!err && !imports && can_skip && ftruncate(file, (off_t)v.size) < 0) {
    if (errno == EFBIG) err = -EFBIG; /* others: a device or pipe has no size */
    can_skip = 0;
  }
  for (uint64_t off = 0; off < v.size && !err; off += n) {
    /* Ask once for each run of data and each hole: some file systems take long
     * to answer. */
    if (off >= end)
      is_data = imports ? os_is_data(file, off, v.size, &end)
                        : cli_is_data(&v, off, &end);
    /* Of a stream nobody knows how much is left: it has no progress to show. */
    if (cli_progress(job, is_stream ? 0 : off, v.size)) err = -ECANCELED;
    assert(end > off);
    n = end - off; /* a hole is skipped as a whole */
    if (err || (can_skip && !is_data)) continue;
    uint64_t wanted = u_min(n, IO_UNIT);
    n = wanted;
    if (can_skip) lseek(file, (off_t)off, SEEK_SET);
    err = imports ? cli_move(job, file, POLLIN, buffer, &n)
                  : v.ops->read(v.ctx, buffer, off, n, 0);
    if (!err && n < wanted && !is_stream) err = -EIO; /* it has been cut */
    if (n < wanted) v.size = off + n;
    if (err || !n) break;
    err = imports ? v.ops->write(v.ctx, buffer, off, n, 0)
                  : cli_write(job, file, buffer, n);
  }
  NBDSERVE_FREE(buffer);
  assert(err <= 0);
  /* A stream that fills the largest volume may go on behind it. */
  if (!err && is_stream && v.size == most) err = -EFBIG;
  if (!v.ops) return err; /* it was not opened */
  if (!imports) v.ops->close(v.ctx);
  int finish_err = imports ? nbdserve_cas_finish(cli.cas, &v, !err) : 0;
  return err ? err : finish_err;
}

/* ---- The table ----
 * init comes first.  Where the names are in a command line they are commands,
 * but for serve, which cli_turn_to_server sends. */

/* clang-format off */
static const struct cli_verb cli_verbs[] = {
    {"init", "STORE [BLOCK-SIZE]", "make an empty store (4K)",
     NULL, 0, 1, VERB_SIZE, 0, 0},
    {"create", "STORE::VOLUME SIZE", "make a volume, all zeroes",
     cli_do_change, 2, 2, VERB_SIZE, 0, NBDSERVE_CAS_CREATE},
    {"import", "STORE::VOLUME FILE", "make a volume of FILE (-: std. input)",
     cli_do_copy, 2, 2, VERB_LONG | VERB_READS_FILE, 0, 0},
    {"export", "STORE::NAME FILE", "copy to a file (-: standard output)",
     cli_do_copy, 2, 2, VERB_LONG | VERB_WRITES_FILE, NBDSERVE_CAS_READONLY, 0},
    {"list", "STORE", "print name, size, time, id, clients",
     cli_do_list, 0, 0, VERB_LONG | VERB_ROWS, NBDSERVE_CAS_READONLY, 0},
    {"snapshot", "STORE::VOLUME@SNAP...", "keep what VOLUME holds now",
     cli_do_change, 1, INT_MAX, 0, 0, NBDSERVE_CAS_SNAPSHOT},
    {"seal", "STORE::VOLUME@SNAPSHOT", "print the id of its contents",
     cli_do_seal, 1, 1, VERB_LONG, 0, 0},
    {"rollback", "STORE::VOLUME@SNAPSHOT", "make VOLUME what it was then",
     cli_do_change, 1, 1, VERB_DRY_RUN, 0, NBDSERVE_CAS_ROLLBACK},
    {"clone", "STORE::NAME VOLUME...", "make volumes that begin as copies",
     cli_do_change, 2, INT_MAX, VERB_NEW_NAME, 0, NBDSERVE_CAS_CLONE},
    {"rename", "STORE::NAME NEW", "change a name",
     cli_do_change, 2, 2, VERB_NEW_NAME, 0, NBDSERVE_CAS_RENAME},
    {"resize", "STORE::VOLUME SIZE", "cut a volume, or add zeroes",
     cli_do_change, 2, 2, VERB_DRY_RUN | VERB_SIZE, 0, NBDSERVE_CAS_RESIZE},
    {"rm", "STORE::NAME [NAME...]", "remove volumes and snapshots",
     cli_do_change, 1, INT_MAX, VERB_DRY_RUN, 0, NBDSERVE_CAS_RM},
    {"diff", "STORE::NAME NAME", "print the ranges that differ",
     cli_do_diff, 2, 2, VERB_LONG | VERB_ROWS, NBDSERVE_CAS_READONLY, 0},
    {"verify", "STORE", "check all data; print what is damaged",
     cli_do_verify, 0, 0, VERB_LONG | VERB_ROWS, NBDSERVE_CAS_READONLY, 0},
    {"repair", "STORE [FROM]", "mend what it can; print what it cannot",
     cli_do_verify, 0, !NBDSERVE_NO_CLIENT, VERB_LONG | VERB_ROWS | VERB_PEER,
     NBDSERVE_CAS_REPAIR, 0},
#if !NBDSERVE_NO_CLIENT
    {"pull", "STORE::VOLUME@SNAP FROM", "get a sealed snapshot from elsewhere",
     cli_do_seal, 2, 2, VERB_LONG | VERB_PEER, 0, 0},
#endif
    {"gc", "STORE", "give unused space back; print its bytes",
     cli_do_gc, 0, 0, VERB_LONG, 0, 0},
    {"stat", "STORE", "print how much is stored",
     cli_do_stat, 0, 0, 0, NBDSERVE_CAS_READONLY, 0},
    {"uri", "STORE", "print the URI and process id of its server",
     cli_do_uri, 0, 0, 0, NBDSERVE_CAS_READONLY, 0},
    {"serve", NULL, NULL, cli_do_serve, 0, 0, VERB_LONG, 0, 0}};
/* clang-format on */

/* The command of that name, or NULL */
static const struct cli_verb *cli_find_verb(const char *name) {
  for (size_t i = 0; i < COUNT_OF(cli_verbs); i++)
    if (strcmp(cli_verbs[i].name, name) == 0) return &cli_verbs[i];
  return NULL;
}

/* ---- Doing a command ---- */

/* For qsort: snapshots come before the others, such as their volumes. */
static int cli_compare_ops(const void *a, const void *b) {
  const struct nbdserve_cas_op *x = a;
  const struct nbdserve_cas_op *y = b;
  return (strchr(y->name, '@') != NULL) - (strchr(x->name, '@') != NULL);
}

/* Makes the ops of a job from its operands: one for each operand or, if the
 * command needs two, for the first with each of the others, or at least one:
 *
 *   rm a b         a; b                  (what is a name and what is `to`)
 *   clone a b c    a to b; a to c
 *   resize a 1G    a to 1G, with 1G as the size
 *   list           one op without a name
 *
 * Both sides do this: we, to tell of a mistake before the store is opened, and
 * the server with what it was sent.
 *
 * Returns 0 or -errno; the ops are freed with the job.  -EINVAL: too few or too
 * many operands.  -EDOM: the last one is not a size. */
static int cli_split_operands(struct cli_job *job) {
  const struct cli_verb *verb = job->verb;
  const char *end = job->operands + job->request.length;
  const char *p = job->operands;
  int n = 0;
  for (const char *q = p; q < end; q += strlen(q) + 1)
    n++;
  if (n < verb->min || n > verb->max) return -EINVAL;
  job->ops = u_zalloc(((size_t)n + 1) * sizeof *job->ops);
  if (!job->ops) return -ENOMEM;
  if (verb->min == 2) p += strlen(p) + 1;
  for (; p < end || !job->nops; p += strlen(p) + 1) {
    struct nbdserve_cas_op *op = &job->ops[job->nops++];
    op->verb = verb->change | (job->request.dry_run ? NBDSERVE_CAS_DRY_RUN : 0);
    op->name = verb->min == 2 ? job->operands : p;
    op->to = verb->min == 2 ? p : "";
    if (!(verb->flags & VERB_SIZE) || !n) continue;
    if (!u_parse_number(p, INT64_MAX, &op->size)) return -EDOM;
  }
  assert(job->nops > 0 && job->nops <= (size_t)n + 1);
  if (verb->change == NBDSERVE_CAS_RM) /* users need not think of the order */
    qsort(job->ops, job->nops, sizeof *job->ops, cli_compare_ops);
  return 0;
}

/* Is the operand of a command an id, of which the store knows what it means? */
static int cli_is_id(const struct cli_verb *verb, const char *name) {
  return verb->change != NBDSERVE_CAS_CREATE && !strncmp(name, "sha256-", 7);
}

/* Turns the error of a command into a text.  nbdserve.h gives some of them a
 * meaning of their own.  -EINVAL says nothing but that a name or size cannot be
 * right: what is wrong with it is found out here, from what the command is to
 * do, and `name` is the one that it is about. */
static const char *cli_why(const struct cli_verb *verb,
                           const struct nbdserve_cas_op *op, int err) {
  int change = verb->change;
  const char *name = verb->flags & VERB_NEW_NAME ? op->to : op->name;
  const char *at = strchr(name, '@');
  if (err == -ENOENT) return "no such volume or snapshot (list names all)";
  if (err == -EEXIST) return "that name is taken";
  if (err == -EBUSY && verb->flags & VERB_PEER)
    return "another pull gets it already";
  if (err == -EBUSY) return "in use by a client; end that first";
  if (err == -ENOTEMPTY) return "it has snapshots; remove them first";
  if (err == -EUCLEAN) return "the store is damaged (verify names what is)";
  if (err == -ETIMEDOUT) return "nobody takes its output";
  if (err == -ENOTCONN)
    return "it is not served, or only to be read, or not at a known address";
  if (err == -ENOSPC && verb->flags & VERB_PEER)
    return "no space left but for others; what came is kept (list, rm)";
  if (err == -ENOSPC && verb->flags & VERB_READS_FILE)
    return "no space left; what it took is free in the store (gc returns it)";
  if (err != -EINVAL) return strerror(-err);
  if (cli_is_id(verb, op->name))
    return "several snapshots have that id, or it cannot be used here";
  if (verb->flags & VERB_PEER)
    return "a snapshot is called VOLUME@NAME, each 1 to 166 bytes without "
           "/ @ \" \\";
  if (change == NBDSERVE_CAS_ROLLBACK || verb->run == cli_do_seal)
    return "not a snapshot: that is VOLUME@NAME";
  if (change == NBDSERVE_CAS_RESIZE && at) return "a snapshot keeps its size";
  int is_snapshot = strchr(op->name, '@') && change != NBDSERVE_CAS_CLONE;
  if ((change == NBDSERVE_CAS_SNAPSHOT || is_snapshot) && !at)
    return "a snapshot is called VOLUME@NAME";
  if (!cas_is_name(at ? at + 1 : name))
    return "not a name: 1 to 166 bytes without / @ \" \\ and not sha256-...";
  if (at) return "a name with @ is a snapshot's, of that volume";
  return "too large, or it cannot be combined with the others";
}

/* Does a command on an open store, and prints what it has to say.  (The FILE of
 * an import is not named in a message, as the errors that come after it was
 * opened are about the volume.  A reader who has seen enough of a list, as
 * `head` does, wants none.  Nor does whoever was told by rows of damage.)
 * Returns the exit status. */
static int cli_run_job(struct cli_job *job) {
  unsigned flags = job->verb->flags;
  const char *end = job->request.json && flags & VERB_ROWS ? "]\n" : "";
  assert(job->verb->run);
  assert(job->nops > 0 && !job->nrows && !job->lost && !job->shown_ms);
  job->begun_ms = os_now_ms();
  job->peer = (struct nbdserve_peer){.in_fd = job->fds.in,
                                     .out_fd = job->fds.in,
                                     .stall_ms = cli.server->config.stall_ms,
                                     .progress = cli_progress,
                                     .arg = job};
  int err = job->verb->run(job);
  cli_hide_progress(job);
  /* A list that has failed before its first row is no JSON at all; one that
   * fails later is closed, and the exit status tells that it is not whole. */
  if (*end && !job->nrows) end = err ? "" : "[]\n";
  if (!job->lost) job->lost = cli_write(job, job->fds.output, end, strlen(end));
  if (job->lost) err = job->lost;
  if (!err) return 0;
  assert(job->failed < job->nops);
  const struct nbdserve_cas_op *op = &job->ops[job->failed];
  const char *name = *op->name ? op->name : cli.store;
  /* What is missing here is the name; at a peer it is the other one. */
  int is_missing = err == -ENOENT && !*job->peer.why;
  const char *to = flags & VERB_READS_FILE || is_missing ? "" : op->to;
  const char *why = cli_why(job->verb, op, err);
  if (*job->peer.why && err != -EUCLEAN) why = job->peer.why;
  if (!(err == -EUCLEAN && job->nrows) && job->lost != -EPIPE)
    cli_say_to(job->fds.messages, job->request.json, "%s %.999s%s%.999s: %s",
               job->verb->name, name, *to ? " " : "", to, why);
  if (err == -EINVAL && !cli_is_id(job->verb, op->name)) return CLI_USAGE;
  return err == -EUCLEAN ? CLI_DAMAGED : CLI_FAILED;
}

/* ---- Commands over the control socket ----------------------------------- */

/* Sends the request of a job to the other side of the connection, with its
 * descriptors, of which the server gets duplicates, or receives such a message.
 * What is received comes in one go.  Where no descriptor has come there stays
 * -1, as the system writes over what we have put into the message only what it
 * has got.  There is room for these: if somebody sends more, the system closes
 * the rest.  Returns 0 or -errno. */
static int cli_pass(struct cli_job *job, int sends) {
  const socklen_t len = CMSG_LEN(sizeof job->fds);
  union { /* gives the room the alignment of a header */
    struct cmsghdr header;
    char room[CMSG_SPACE(sizeof job->fds)];
  } c = {.header = {.cmsg_len = len, .cmsg_level = SOL_SOCKET}};
  struct iovec data = {&job->request, sizeof job->request};
  struct msghdr m = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &c};
  m.msg_controllen = len;
  c.header.cmsg_type = SCM_RIGHTS;
  memcpy(CMSG_DATA(&c.header), &job->fds, sizeof job->fds);
  ssize_t n = sends ? sendmsg(job->client, &m, MSG_NOSIGNAL)
                    : recvmsg(job->client, &m, MSG_DONTWAIT);
  memcpy(&job->fds, CMSG_DATA(&c.header), sizeof job->fds);
  return n == (ssize_t)data.iov_len ? 0 : -EPROTO;
}

/* Lets the server that we are connected to do a job, waits for it (-1: as long
 * as it takes, or so many milliseconds), and returns the exit status.  A signal
 * ends the wait; that we are gone ends the job. */
static int cli_run_remote(struct cli_job *job, int ms) {
  unsigned char status = CLI_FAILED;
  size_t length = job->request.length;
  assert(job->client >= 0 && !cli.cas);
  job->request.version = CLI_VERSION;
  job->request.verb = (unsigned char)(job->verb - cli_verbs);
  int err = cli_pass(job, 1);
  if (!err) err = cli_write(job, job->client, job->operands, length);
  if (!err) cli_wait(job, -1, 0, ms);
  if (err || recv(job->client, &status, 1, MSG_DONTWAIT) != 1)
    cli_say("%s: canceled, or no answer from the server", job->verb->name);
  return status;
}

/* Receives a job, within IO_GRACE_MS, so that somebody who connects and says
 * nothing does not keep a thread.  Only the owner of the store and root can
 * connect, but nothing of what they send is believed.  Returns 0, or -errno if
 * it makes no sense: no system has command lines of more than 8 MiB. */
static int cli_receive(struct cli_job *job) {
  struct io io = {.in = job->client, .out = job->client};
  io.stop = *cli.server->stop;
  io.stall_ms = IO_GRACE_MS;
  io.deadline = os_now_ms() + IO_GRACE_MS;
  int err = io_wait_input(&io, io.deadline);
  if (!err) err = cli_pass(job, 0);
  size_t length = job->request.length;
  if (err || job->request.version != CLI_VERSION || length > 8 << 20 ||
      !job->request.verb || job->request.verb >= COUNT_OF(cli_verbs))
    return -EINVAL; /* 0: init, which is for no store that there is */
  job->verb = &cli_verbs[job->request.verb];
  job->operands = u_zalloc(length + 1);
  assert(job->verb->run);
  if (!job->operands || job->fds.messages < 0) return -EINVAL;
  err = io_recv_all(&io, (unsigned char *)job->operands, length);
  return err ? err : cli_split_operands(job);
}

/* The thread of a command; the argument is the number of the connection.  A
 * request that makes no sense is dropped without an answer.  A client that has
 * gone needs none. */
static void *cli_serve_job(void *client) {
  struct cli_job job = {.fds = {-1, -1, -1}, .client = (int)(intptr_t)client};
  unsigned char status = CLI_FAILED;
  assert(job.client >= 0 && cli.cas);
  if (cli_receive(&job) == 0) {
    /* It counts itself first: of two that come together as number 16 and 17 one
     * is refused. */
    int is_long = (job.verb->flags & VERB_LONG) != 0;
    if (cli_count(0, is_long) <= 16 || !is_long)
      status = (unsigned char)cli_run_job(&job);
    else
      cli_say_to(job.fds.messages, job.request.json,
                 "%s: the server is doing 16 others", job.verb->name);
    cli_count(0, -is_long);
    (void)!send(job.client, &status, 1, MSG_NOSIGNAL);
  }
  close(job.fds.output); /* closing -1 does no harm */
  close(job.fds.messages);
  close(job.fds.in);
  close(job.client);
  NBDSERVE_FREE(job.operands);
  NBDSERVE_FREE(job.ops);
  cli_count(-1, 0);
  return NULL;
}

/* The thread that takes commands until the server stops: that makes
 * io_wait_input fail, and ends commands that are under way (cli_wait).  For
 * want of descriptors a client may have to wait; a command that gets no thread
 * is done here, and the others wait. */
static void *cli_control(void *unused) {
  struct io io = {.in = cli.ctl, .out = cli.ctl, .stop = *cli.server->stop};
  while (io_wait_input(&io, 0) == 0) {
    int client = os_accept(cli.ctl);
    void *arg = (void *)(intptr_t)client;
    cli_count(client >= 0, 0);
    if (client < 0)
      poll(NULL, 0, SRV_PAUSE_MS);
    else if (os_thread(cli_serve_job, arg))
      cli_serve_job(arg);
  }
  cli_count(-1, 0);
  return unused;
}

/* ---- The store of this process ------------------------------------------ */

/* Do two paths lead to the same file? */
static int cli_are_same(const char *path, const char *other) {
  struct stat file[2];
  if (stat(path, &file[0]) < 0 || stat(other, &file[1]) < 0) return 0;
  return file[0].st_dev == file[1].st_dev && file[0].st_ino == file[1].st_ino;
}

/* Opens the store at path.  The process has one at most.  STORE.ctl lies beside
 * the file itself, so that all who come by symbolic links find it.  Returns 0,
 * or -errno and leaves cli.cas NULL.  -EBUSY: somebody has it.  If that is its
 * server the job is connected to it now; a reader like `list` is waited for,
 * and a server that just starts or ends, for three seconds.
 *
 * A STORE.ctl that is somebody else's is refused: in a directory where
 * everybody may make files a stranger who can read the store could lock it,
 * listen there, and get our descriptors.  A server runs as the owner of the
 * store, as ourselves, or as root. */
static int cli_open_store(const char *path, uint32_t how, struct cli_job *job) {
  struct nbdserve_cas_options options = {.flags = how};
  int64_t until = os_now_ms() + 3000;
  struct nbdserve_cas_stat found;
  struct stat st;
  struct stat ctl;
  assert(!cli.cas && job->client < 0);
  if (opt[OPT_NO_VERIFY].given) options.flags |= NBDSERVE_CAS_NO_VERIFY;
  int err = realpath(path, cli.store) && stat(path, &st) == 0 ? 0 : -errno;
  if (err == -ENOENT)
    cli_failed("%s: no such store (`nbdserve init %s` makes one)", path, path);
  if (err) return err;
  snprintf(cli.ctl_path, sizeof cli.ctl_path, "%s.ctl", cli.store);
  do {
    err = nbdserve_cas_open(path, &options, &cli.cas);
    /* An image that somebody serves is locked, too. */
    if (err == -EBUSY && !cli_is_store(path)) err = -EINVAL;
    if (err != -EBUSY) break;
    if (lstat(cli.ctl_path, &ctl) == 0 && ctl.st_uid != st.st_uid &&
        ctl.st_uid != geteuid() && ctl.st_uid != 0)
      cli_failed("%s: belongs neither to the owner of the store nor to us",
                 cli.ctl_path);
    job->client = srv_unix_socket(cli.ctl_path, SRV_CONNECT);
  } while (job->client < 0 && os_now_ms() < until &&
           cli_wait(job, -1, 0, 50) == -ETIMEDOUT);
  if (err == -EINVAL) cli_failed("%s: not a store", path);
  if (err == -EOPNOTSUPP)
    cli_failed("%s: a store of another format version than 2", path);
  if (err == -EUCLEAN &&
      how & (NBDSERVE_CAS_ACCEPT_LOSS | NBDSERVE_CAS_READONLY))
    cli_die(CLI_DAMAGED, "%s: damaged beyond repair", path);
  if (err == -EUCLEAN)
    cli_die(CLI_DAMAGED, "%s: damaged; `nbdserve repair %s%s` goes on", path,
            how & NBDSERVE_CAS_REPAIR ? "--accept-loss " : "", path);
  assert(!err == !!cli.cas);
  if (!err) nbdserve_cas_stat(cli.cas, &found);
  if (!err && found.damaged)
    cli_say("%s: damaged, something may be missing (verify names it)", path);
  return err;
}

/* Starts the threads of a store that is served: what the store itself does in
 * the background, and what takes commands.  This comes after --fork and after
 * the command was started: from now on the process makes no other one, which
 * would inherit the descriptors that come with commands.  Without the thread
 * nobody would answer at STORE.ctl, and a command would wait for ever; so the
 * socket is closed.  A read-only server takes no commands: next to it the store
 * can be opened by other readers. */
static void cli_start_control(void) {
  if (cli.cas) cas_kick(cli.cas);
  if (!cli.ctl) return;
  cli_count(1, 0); /* cli_control */
  int err = cli.ctl < 0 ? cli.ctl : os_thread(cli_control, NULL);
  if (!err) return;
  cli_count(-1, 0);
  close(cli.ctl);
  if (!opt[OPT_QUIET].given)
    cli_say("%s: %s; no commands are taken", cli.ctl_path, strerror(-err));
}

/* Takes note of the first volume, for the URI: an nbdserve_list_fn that ends
 * the list. */
static int cli_first_volume(void *arg, const struct nbdserve_cas_info *info) {
  static char name[WIRE_STRING_MAX];
  (void)arg;
  snprintf(name, sizeof name, "%s", info->name);
  if (!info->partial) cli.export_name = name;
  return !info->partial;
}

/* What is done when the store at path turns out to be served by another
 * process, to which the job is connected.  For -s STORE:: that process serves
 * our client, on our standard streams, and we wait until it has.  It knows
 * nothing of most options, nor of other targets, so these are refused.
 * Otherwise it only says where it serves the store; it may be stuck, so we do
 * not wait for long.  Returns the exit status. */
static int cli_turn_to_server(const char *path, const char *volume,
                              struct cli_job *job) {
  int passes = opt[OPT_STDIN].given && !*volume;
  assert(job->client >= 0 && !cli.cas);
  job->verb = cli_find_verb(passes ? "serve" : "uri");
  if (passes) {
    cli_refuse(~(BIT(STDIN) | BIT(QUIET) | BIT(VERBOSE) | BIT(JSON)),
               "not for a store that another process serves:", path);
    if (cli.ntargets > 1) cli_usage("%s: another process serves it", path);
    return cli_run_remote(job, -1);
  }
  cli_say("%s: in use by a server; stop or use it.  URI, process id:", path);
  job->fds.output = 2; /* standard output is for our own URI */
  cli_run_remote(job, 2000);
  return CLI_IN_USE;
}

/* Opens a volume or snapshot of a store.  Before it opens the store, if that is
 * not open yet, and the socket for commands.  STORE.ctl is for ourselves and
 * root only: the umask is in force when it is made, so there is no moment at
 * which others get in.  If it cannot be made (its path may be too long for a
 * socket, or the directory read-only) the store is served all the same, and
 * cli_start_control says what that means.
 *
 * With --changes the volume gets only that context besides base:allocation, and
 * it has to be there.
 *
 * With the name "" the server finds and lists all that is in the store, also
 * what is made later, and *ex stays as it is.  If it is the only target, the
 * URI names its first volume. */
static int cli_open_volume(const char *path, const char *name,
                           struct nbdserve_export *ex) {
  uint32_t how = opt[OPT_READ_ONLY].given ? NBDSERVE_CAS_READONLY : 0;
  struct cli_job remote = {.fds = {1, 2, 0}, .client = -1};
  char context[WIRE_STRING_MAX + 1];
  uint32_t number = 0;
  if (cli.cas && !cli_are_same(path, cli.store))
    cli_failed("%s: one store at a time: %s is open", path, cli.store);
  int err = cli.cas ? 0 : cli_open_store(path, how | CAS_KICK_LATER, &remote);
  if (remote.client >= 0) exit(cli_turn_to_server(path, name, &remote));
  if (err) return err;
  /* Now the store is ours, so a STORE.ctl that is there is a leftover. */
  assert(cli.cas && *cli.ctl_path);
  mode_t mask = umask(0177);
  if (!cli.ctl && !how && !NBDSERVE_NO_THREADS)
    cli.ctl = srv_unix_socket(cli.ctl_path, SRV_LISTEN);
  umask(mask);
  if (cli.ctl > 0) lstat(cli.ctl_path, &cli.ctl_st);
  if (!*name) {
    cli.server->config.find = cli_find_volume;
    cli.server->config.list = cli_list_volumes;
    if (cli.ntargets == 1) nbdserve_cas_list(cli.cas, cli_first_volume, NULL);
    return 0;
  }
  err = nbdserve_cas_volume(cli.cas, name, ex);
  if (err || !ex->contexts) return err;
  /* It must be one of those that the volume would have without that. */
  do
    number = ex->ops->next_context(ex->ctx, number, context);
  while (number && strcmp(context, cli_context) != 0);
  if (!number)
    cli_failed("--changes %s: no other snapshot of the target is called so",
               opt[OPT_CHANGES].text);
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
  size_t n = fallback ? strlen(fallback) : 0;
  if (n == 0) fallback = NULL; /* it may be set to nothing */
  if (n > 2 && strcmp(fallback + n - 2, "::") == 0) fallback[n - 2] = '\0';
  char *first = cli.ntargets ? *cli.targets : NULL;
  char *colons = first ? strstr(first, "::") : NULL;
  uint64_t size;
  /* In `init 64K` the word would do as the path of a store, too. */
  int is_size = !verb->run && cli.ntargets == 1 && fallback &&
                u_parse_number(first, INT64_MAX, &size);
  if (!first || (!colons && (verb->min || is_size))) return fallback;
  if (colons) *colons = '\0';
  if (colons) *cli.targets = colons + 2;
  /* A name where the command takes none stays: it is one operand too many. */
  if (!colons || (!verb->min && !colons[2])) {
    cli.targets++;
    cli.ntargets--;
  }
  return first;
}

/* The name in a later operand.  "STORE::" may stand before it if that is the
 * same store.  Where there is no such file, "::" belongs to the name, but a new
 * name with it is refused; so is a volume where a FILE is meant.  flags: of the
 * command. */
static const char *cli_same_store(const char *store, const char *operand,
                                  unsigned flags) {
  const char *colons = strstr(operand, "::");
  char path[PATH_MAX];
  if (!colons || !store) return operand;
  snprintf(path, sizeof path, "%.*s", (int)(colons - operand), operand);
  int is_file = (flags & (VERB_READS_FILE | VERB_WRITES_FILE)) != 0;
  if (is_file && cli_is_store(path))
    cli_usage("%s: a volume, and not a FILE", operand);
  int is_there = !is_file && access(path, F_OK) == 0;
  if (!is_there && flags & VERB_NEW_NAME)
    cli_usage("%s: no such store, and no name of a volume", operand);
  if (!is_there) return operand;
  if (!cli_are_same(store, path))
    cli_usage("%s: in another store than %s", operand, store);
  return colons + 2;
}

/* Opens the FILE of an import or export, which takes the place of the output.
 * We do it, even if a server does the command: relative paths and permissions
 * are ours.  A regular FILE is written under another name until it is whole; a
 * symbolic link to one stays.  A FILE that is to be written may be a store,
 * this one perhaps, or an image that is being served: both are locked, and
 * nobody wants to lose them.  One that is read is locked against writers; but
 * not standard input, as that lock would be the caller's, too. */
static int cli_open_file(const char *file, int writes) {
  struct stat st = {.st_mode = S_IFREG}; /* of a FILE that is to be made */
  int how = (writes ? O_WRONLY : O_RDONLY) | O_CLOEXEC | O_NOCTTY;
  int is_standard = strcmp(file, "-") == 0;
  if (writes && is_standard) return 1;
  int fd = is_standard ? 0 : open(file, how);
  if (fd < 0 && (!writes || errno != ENOENT)) cli_exit_if_error(-errno, file);
  fstat(fd, &st); /* with -1 it stays as it is */
  if (fd > 0) cli_exit_if_error(os_lock_file(fd, !writes), file);
  if (writes && cli_is_store(file))
    cli_failed("%s: a store; remove it first, or take another file", file);
  if (!writes && (S_ISCHR(st.st_mode) || S_ISDIR(st.st_mode)))
    cli_failed("%s: neither a file nor a block device nor a pipe", file);
  if (!writes || !S_ISREG(st.st_mode)) return fd;
  cli_catch_signals(cli_on_signal); /* now there is something to remove */
  const char *real = realpath(file, NULL); /* is not freed */
  return cli_new_file(real ? real : file, fd >= 0 ? &st : NULL);
}

/* ---- The peer of a command ---- */

/* Copies what stands up to `end` to out[size], with bytes for each %XX.  False:
 * there is no room, or it is malformed. */
static int cli_decode(const char *p, const char *end, char *out, size_t size) {
  for (; p < end && size > 1; p++, size--) {
    *out = *p;
    if (*p == '%') {
      if (strspn(p + 1, "0123456789abcdefABCDEF") < 2) return 0;
      sscanf(p + 1, "%2hhx", (unsigned char *)out);
      p += 2;
    }
    if (!*out++) return 0;
  }
  *out = '\0';
  return p == end;
}

/* Connects to the server that an NBD URI (doc/uri.md of NetworkBlockDevice/nbd)
 * names, or ends the process.  The operand is the URI, and becomes the name of
 * the export in it, which must not be empty if the command needs_name.  Returns
 * a descriptor.
 *
 * The URI is read from front to back: p is at its host, slash at the end of
 * that, query at its "?", or at the end of the URI. */
static int cli_connect_uri(char **operand, int needs_name) {
  static char name[WIRE_STRING_MAX + 1];
  const char *uri = *operand;
  char path[PATH_MAX] = ""; /* of a unix socket; "": it is TCP */
  char host[256] = "";      /* "": this machine */
  uint64_t port = 10809;    /* also if nothing stands behind the colon */
  int fd = -EAFNOSUPPORT;
  int is_unix = strncmp(uri, "nbd+unix://", 11) == 0;
  const char *p = uri + (is_unix ? 11 : 6);
  int is_good = is_unix || strncmp(uri, "nbd://", 6) == 0;
  const char *slash = is_good ? p + strcspn(p, "/?") : uri;
  const char *query = slash + strcspn(slash, "?");
  const char *end = query + strlen(query);
  is_good = is_good && !strpbrk(query, "&#") &&
            cli_decode(slash + (*slash == '/'), query, name, sizeof name);
  if (is_unix) {
    is_good = is_good && slash == p && strncmp(query, "?socket=", 8) == 0 &&
              cli_decode(query + 8, end, path, sizeof path) && *path;
  } else if (is_good) {
    int bracket = *p == '[';
    const char *colon = p + strcspn(p, bracket ? "]/?" : ":/?");
    is_good = query == end && (!bracket || *colon == ']') &&
              cli_decode(p + bracket, colon, host, sizeof host);
    colon += bracket;
    if (is_good && colon < slash)
      is_good = *colon++ == ':' && colon + strspn(colon, "0123456789") == slash;
    if (is_good && colon < slash) port = strtoull(colon, NULL, 10);
  }
  if (!is_good || port < 1 || port > 65535)
    cli_usage("%s: not as nbd://HOST[:PORT]/NAME or "
              "nbd+unix:///NAME?socket=PATH",
              uri);
  if (needs_name && !*name) cli_usage("%s: no name behind it", uri);
  *operand = name;
  if (is_unix) fd = srv_unix_socket(path, SRV_CONNECT);
#if !NBDSERVE_NO_TCP
  struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
  struct addrinfo *all = NULL;
  char digits[24];
  snprintf(digits, sizeof digits, CLI_N, port);
  int err =
      is_unix ? 0 : getaddrinfo(*host ? host : NULL, digits, &hints, &all);
  if (err) cli_failed("%s: %s", uri, gai_strerror(err));
  for (struct addrinfo *a = all; a && fd < 0; a = a->ai_next) {
    fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, a->ai_addr, a->ai_addrlen) == 0) break;
    err = -errno;
    close(fd);
    fd = err;
  }
  if (all) freeaddrinfo(all);
#endif
  if (fd < 0) cli_failed("%s: %s", uri, strerror(-fd));
  os_setup_client(fd);
  return fd;
}

/* Starts the command that is a server on its standard streams.  Returns a
 * descriptor of them. */
static int cli_start_peer(pid_t *pid) {
  int fd[2];
  assert(cli.command && *cli.command);
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd) < 0)
    cli_exit_if_error(-errno, *cli.command);
  *pid = fork();
  if (*pid < 0) cli_exit_if_error(-errno, "fork");
  if (*pid == 0) {
    cli_catch_signals(SIG_DFL);
    if (dup2(fd[1], 0) == 0 && dup2(fd[1], 1) == 1)
      execvp(*cli.command, cli.command);
    cli_say("%s: %s", *cli.command, strerror(errno));
    _exit(127);
  }
  close(fd[1]);
  return fd[0];
}

/* Does a command on a store, here or at its server, and returns the exit
 * status.  --accept-loss is for a store that cannot be opened without it, so
 * there is no server to do that.
 *
 * From where a FILE is open signals end the command in order, and not before:
 * to open a FIFO waits for its other side.  After an export what was written is
 * made durable, where that can be (not in a pipe or terminal), and a regular
 * FILE appears.
 *
 * A peer that we have started ends when its streams are closed; one that does
 * not within five seconds gets SIGTERM, after ten SIGKILL.  When our command
 * has succeeded, but the peer has not, we say that. */
static int cli_run_on_store(struct cli_job *job, const char *store) {
  unsigned flags = job->verb->flags;
  uint32_t how = job->verb->open;
  const char *file = job->ops->to; /* if the command has one */
  int wait_status = 0;
  pid_t pid = 0;
  assert(job->nops > 0 && job->client < 0 && !cli.cas);
  if (flags & VERB_READS_FILE && cli_are_same(store, file))
    cli_usage("%s: the store itself, which grows while it is read", file);
  if (opt[OPT_ACCEPT_LOSS].given) how |= NBDSERVE_CAS_ACCEPT_LOSS;
  if (flags & (VERB_READS_FILE | VERB_WRITES_FILE))
    job->fds.output = cli_open_file(file, !(flags & VERB_READS_FILE));
  if (cli.command) job->fds.in = cli_start_peer(&pid);
  cli_catch_signals(cli_on_signal);
  int err = cli_open_store(store, how, job);
  if (err == -EBUSY && job->client == -EACCES)
    cli_failed("%s: %s; the store is served by another user", cli.ctl_path,
               strerror(EACCES));
  if (err == -EBUSY && job->client < 0)
    cli_die(CLI_IN_USE, "%s: in use by one that takes no commands", store);
  if (err == -EBUSY && how & NBDSERVE_CAS_ACCEPT_LOSS)
    cli_die(CLI_IN_USE, "%s: is being served; stop the server first", store);
  if (err != -EBUSY) cli_exit_if_error(err, store);
  /* With -EBUSY we are connected to the store's server. */
  int status = err ? cli_run_remote(job, -1) : cli_run_job(job);
  if (job->request.peer) close(job->fds.in);
  for (int ms = 0; pid && waitpid(pid, &wait_status, WNOHANG) == 0; ms += 20) {
    if (ms == 5000) kill(pid, SIGTERM);
    if (ms == 10000) kill(pid, SIGKILL);
    poll(NULL, 0, 20);
  }
  int peer_status = cli_exit_status(wait_status);
  if (!status && peer_status)
    cli_say("%s: has ended with status %d", *cli.command, peer_status);
  if (status || !(flags & VERB_WRITES_FILE)) return status;
  /* The order: the data, then the name, then that the directory has it. */
  err = os_datasync(job->fds.output);
  if (err != -EINVAL && err != -ENOTSUP) cli_exit_if_error(err, file);
  if (!*cli.temp) return status;
  cli_put_new_file();
  cli_exit_if_error(os_sync_new_file(job->fds.output, cli.path), file);
  return status;
}

/* The options that a command takes, a BIT for each.  A command behind "--" is
 * noted as --run; that option itself is for servers. */
static uint64_t cli_options_of(const struct cli_verb *verb) {
  uint64_t allowed =
      BIT(JSON) | BIT(NO_VERIFY) | BIT(STALL) | BIT(QUIET) | BIT(VERBOSE);
  if (verb->flags & VERB_DRY_RUN) allowed |= BIT(DRY_RUN);
  if (verb->open == NBDSERVE_CAS_REPAIR) allowed |= BIT(ACCEPT_LOSS);
  if (verb->flags & VERB_PEER && cli.command && !opt[OPT_RUN].text)
    allowed |= BIT(RUN);
  return allowed;
}

/* Finds out what peer a command is to talk to.  With a URI: connects to it, and
 * the name in it takes its place as the last operand (repair, which needs no
 * name, loses the operand).  With a command behind "--" the last operand is
 * that name already; cli_run_on_store starts the command. */
static void cli_take_peer(struct cli_job *job) {
  int most = job->verb->max; /* operands, with that */
  char **last = cli.ntargets ? &cli.targets[cli.ntargets - 1] : NULL;
  job->request.peer = cli.command || cli.ntargets == most;
  assert(most == 1 || most == 2);
  if (cli.command && !*cli.command) cli_usage("--: no command behind it");
  if (cli.command && most == 1 && last)
    cli_usage("%s: not together with a command", *last);
  if (cli.command && last && strstr(*last, "://"))
    cli_usage("%s: a name there, if there is a command", *last);
  if (cli.command || cli.ntargets != most) return;
  job->fds.in = cli_connect_uri(last, most > 1);
  if (most == 1) cli.ntargets = 0; /* repair: the URI was all there is */
}

/* If the command line is a command on a store: does it, and ends the process.
 * Its first word has to be one of the names in cli_verbs; a file of such a name
 * is served as ./NAME.
 *
 * The operands are put behind each other, as they go over the control
 * socket. */
static void cli_run_verb(void) {
  static struct cli_job job = {.fds = {1, 2, 0}, .client = -1};
  struct nbdserve_cas_options options = {.flags = 0};
  const char *name = cli.ntargets ? *cli.targets : "";
  size_t length = 0;
  job.verb = cli_find_verb(name);
  if (!job.verb || !job.verb->help) return;
  job.request.json = opt[OPT_JSON].given != 0;
  job.request.dry_run = opt[OPT_DRY_RUN].given != 0;
  cli.targets++;
  cli.ntargets--;
  char *store = cli_take_store(job.verb);
  cli_refuse(~cli_options_of(job.verb), "not for the command", name);
  if (store && job.verb->flags & VERB_PEER) cli_take_peer(&job);
  FILE *out = open_memstream(&job.operands, &length);
  for (int j = 0; out && j < cli.ntargets; j++) {
    const char *operand = cli.targets[j];
    if (j && !job.request.peer)
      operand = cli_same_store(store, operand, job.verb->flags);
    fwrite(operand, 1, strlen(operand) + 1, out);
  }
  int err = out && fclose(out) == 0 ? 0 : -ENOMEM;
  job.request.length = (uint32_t)length;
  if (!err) err = store ? cli_split_operands(&job) : -EINVAL;
  if (err == -EINVAL)
    cli_usage("usage: nbdserve %s %s", name, job.verb->operands);
  if (err != -EDOM) cli_exit_if_error(err, name);
  const char *size = *job.ops->to ? job.ops->to : job.ops->name;
  if (err) cli_usage("%s %s: not a size", name, size);
  if (job.verb->run) exit(cli_run_on_store(&job, store));
  options.block_size = (uint32_t)u_min(job.ops->size, UINT32_MAX);
  /* 0 would be the default; 1 is refused. */
  if (*size && !options.block_size) options.block_size = 1;
  err = nbdserve_cas_init(store, &options);
  if (err == -EINVAL && *size)
    cli_usage("%s: not a block size (4K, 8K, 16K, 32K or 64K)", size);
  if (err == -EEXIST)
    cli_failed("%s: exists, and is no unused device: use another name", store);
  cli_exit_if_error(err, store);
  exit(0);
}

/* help COMMAND: prints what there is to know about it.  Returns the exit
 * status. */
static int cli_help_verb(const char *name) {
  const struct cli_verb *verb = cli_find_verb(name);
  if (!verb || !verb->help)
    cli_usage("help %s: no such command (--help lists them)", name);
  printf("usage: nbdserve [OPTION]... %s %s\n%s\n\n", name, verb->operands,
         verb->help);
  for (int id = 0; id < OPT_COUNT; id++)
    if (cli_options_of(verb) >> id & 1) cli_help_option(id);
  return cli_end_output();
}

/* Prints the commands for --help. */
static void cli_help_verbs(void) {
  puts("\nCommands on stores, also while they are served.  NAME is VOLUME,\n"
       "VOLUME@SNAPSHOT or the id of a sealed snapshot; names that follow\n"
       "are in the same store.");
  for (size_t i = 0; i < COUNT_OF(cli_verbs) && cli_verbs[i].help; i++)
    printf("  %-9s %-23s %s\n", cli_verbs[i].name, cli_verbs[i].operands,
           cli_verbs[i].help);
  puts("FROM is a URI, or NAME -- CMD, where CMD serves a store on its "
       "standard\nstreams: pool::vm@2 vm@2 -- ssh HOST nbdserve -s pool::.  "
       "repair needs\nno NAME.");
}

#else /* NBDSERVE_NO_CAS: there are no commands, and no store can be opened. */
#define cli_start_control() ((void)0)
#define cli_open_volume(path, name, ex) (-EOPNOTSUPP)
#define nbdserve_cas_close(cas) 0
#define cli_run_verb() ((void)0)
#define cli_find_verb(name) ((void)(name), 0)
#define cli_help_verb(name) ((void)(name), CLI_USAGE)
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

#if NBDSERVE_NO_FLAT
#define nbdserve_flat_open(path, options, ex) (-EOPNOTSUPP)
#endif

/* Opens a target, which is a volume if that is not NULL, at path.  If that
 * fails the process ends with a message that says why and, where an option
 * helps, which one.  A volume cannot be cut like a file, and has clones in
 * place of --temporary.  What clients write with --temporary goes to a
 * directory of the user's choice; a message about that names it, as it is not
 * the target that is wrong. */
static void cli_open_target(const char *text, const char *path,
                            const char *volume, struct nbdserve_export *ex) {
  const char *hint = "";
  struct nbdserve_flat flat = {.dir = getenv("TMPDIR")};
  if (!flat.dir) flat.dir = "/tmp";
  flat.offset = opt[OPT_OFFSET].number;
  flat.size = opt[OPT_SIZE].number;
  flat.create = opt[OPT_CREATE].number;
  if (opt[OPT_READ_ONLY].given) flat.flags = NBDSERVE_FLAT_READONLY;
  if (opt[OPT_TEMPORARY].given) flat.flags = NBDSERVE_FLAT_TEMPORARY;
  /* What makes no sense is refused before anything is opened or made. */
  if (!*path) cli_usage("a target without a name");
  if (volume && !*volume && cli.ntargets == 1 && (ex->name || ex->description))
    cli_usage("%s: no name or description for all of its volumes", text);
  if (volume && (flat.offset || flat.size || flat.create ||
                 flat.flags == NBDSERVE_FLAT_TEMPORARY))
    cli_usage("%s: no --offset, --size, --create or -T of a volume", text);
  if (volume && !*volume && opt[OPT_CONNECT].given)
    cli_usage("%s: --connect is for one of its volumes", text);
  if (!volume && cli_common.contexts)
    cli_usage("%s: --changes is for volumes of a store", text);
  if (opt[OPT_TEMPORARY].given && access(flat.dir, W_OK) < 0)
    cli_failed("%s: %s ($TMPDIR says where -T writes to)", flat.dir,
               strerror(errno));
  if (!volume && strncmp(text, "file:", 5) != 0 && cli_is_store(path))
    cli_usage("%s: a store; serve %s:: or file:%s", text, text, text);
  int err = volume ? cli_open_volume(path, volume, ex)
                   : nbdserve_flat_open(path, &flat, ex);
  /* What is wrong, and what may help: hints are for whoever did not know. */
  const char *why = strerror(-err);
  if ((err == -EACCES || err == -EROFS) && !flat.flags)
    hint = " (-r serves it read-only)";
  if (err == -ENOENT && !volume && !flat.flags && !flat.create)
    hint = " (--create SIZE makes it; --help names the commands)";
  if (err == -ENOENT && volume)
    cli_failed("%s: no such volume or snapshot (see list %s)", text, path);
  if (err == -EINVAL && !volume) {
    why = "neither a file nor a block device";
    if (flat.offset || flat.size) why = "--offset and --size reach beyond it";
    if (strncmp(path, "mem:", 4) == 0 &&
        !u_parse_number(path + 4, INT64_MAX, &flat.size))
      cli_usage("%s: not a size behind mem: (as in mem:1G)", text);
  }
  if (err == -EBUSY) cli_exit_if_error(err, text);
  if (err) cli_failed("%s: %s%s", text, why, hint);
}

/* Opens a target and adds it to the server, which takes over what is behind the
 * export; if it does not take the export, the process ends.  A whole store adds
 * no export: the server asks for each one when a client does.  The only export
 * may be called what clients like, if nothing gives it a name. */
static void cli_add_target(char *text) {
  struct nbdserve_export ex = cli_common;
  char path[PATH_MAX + 8]; /* one that is cut is still too long */
  char *equals = text + strcspn(text, "/=");
  assert(cli.server && !cli.server->nlisteners);
  ex.name = opt[OPT_EXPORT].text;
  ex.description = opt[OPT_DESCRIPTION].text;
  if (*equals == '=' && strncmp(text, "file:", 5) != 0) {
    *equals = '\0';
    ex.name = text;
    text = equals + 1;
  }
  int is_file = strncmp(text, "file:", 5) == 0;
  const char *rest = is_file ? text + 5 : text;
  /* The backend must not take the file mem:5 for memory. */
  const char *front = is_file && strncmp(rest, "mem:", 4) == 0 ? "./" : "";
  snprintf(path, sizeof path, "%s%s", front, rest);
  /* What an export is called by itself: the volume, or the last part of a path.
   * Of several exports each needs a name, a single one does not. */
  char *colons = is_file ? NULL : strstr(path, "::");
  const char *slash = strrchr(rest, '/');
  const char *name = slash ? slash + 1 : rest;
  if (colons) *colons = '\0';
  if (colons) name = colons + 2;
  if (cli.ntargets > 1 && !ex.name) ex.name = name;
  if (!ex.name) ex.flags |= NBDSERVE_EXPORT_FALLBACK;
  if (ex.name && cli.ntargets == 1) cli.export_name = ex.name;
  cli_open_target(text, path, colons ? name : NULL, &ex);
  /* What a kernel's device is made of: a server of the same bytes may take it
   * over, if it takes the same requests, as the device goes on with its block
   * size and flags.  Memory and overlays die with us, so they have our process
   * id.  `real` is never freed. */
  const char *real = opt[OPT_CONNECT].given ? realpath(path, NULL) : NULL;
  int is_own = opt[OPT_TEMPORARY].given || strncmp(path, "mem:", 4) == 0;
  if (!*cli.owner) /* the first target is what is connected */
    snprintf(cli.owner, sizeof cli.owner,
             "nbdserve:%.1900s::%.1900s:" CLI_N "+" CLI_N ":%d:%u:%u:" CLI_N,
             real ? real : path, colons ? name : "", opt[OPT_OFFSET].number,
             opt[OPT_SIZE].number, is_own ? (int)getpid() : 0,
             opt[OPT_READ_ONLY].given, ex.min_block > 512 ? ex.min_block : 512,
             opt[OPT_WITHOUT].number);
  if (!ex.ops) return;
  assert(ex.ops->read && ex.ops->close);
  int err = nbdserve_add(cli.server, &ex); /* copies name and description */
  if (err) ex.ops->close(ex.ctx);
  if (err == -EEXIST) cli_usage("%s: that export name is taken", text);
  if (err == -EINVAL)
    cli_usage("%s: bad --block-size, name or description", text);
  cli_exit_if_error(err, text);
}

/* ---- Where to listen ---------------------------------------------------- */

/* The longest path of a socket */
#define CLI_PATH_MAX ((int)sizeof((struct sockaddr_un *)0)->sun_path - 1)

/* Listens at an address, as nbdserve_listen takes it, or ends the process with
 * a message that says what is wrong with it.  A descriptor that does not listen
 * is connected to a client, the only one then: a second such socket is an
 * error. */
static void OS_PRINTF(1, 2) cli_listen_at(const char *fmt, ...) {
  char address[PATH_MAX + 8];
  const char *hint = "";
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(address, sizeof address, fmt, ap);
  va_end(ap);
  int err = nbdserve_listen(cli.server, address);
  if (err == -EINVAL && strncmp(address, "fd:", 3) == 0 && cli.client < 0) {
    cli.client = atoi(address + 3);
    return;
  }
  if (err == -EADDRINUSE) hint = "; not replaced";
  if (err == -EINVAL && strncmp(address, "tcp:", 4) == 0)
    hint = ": not a numeric address or localhost, or built without TCP";
  if (err == -ENAMETOOLONG)
    cli_failed("%s: a socket path has at most %d bytes", address, CLI_PATH_MAX);
  if (err) cli_failed("%s: %s%s", address, strerror(-err), hint);
}

/* How many sockets systemd, or a program like nbdinfo, has passed to us from
 * descriptor 3 on.  LISTEN_PID says whom they are for: the variables are
 * inherited by children, who must not believe them.  If one of the sockets is
 * not open the process ends: its number would soon be that of a descriptor of
 * our own. */
static int cli_count_passed(void) {
  const char *pid = getenv("LISTEN_PID");
  const char *fds = getenv("LISTEN_FDS");
  uint64_t n = 0;
  if (!pid || !fds || strtol(pid, NULL, 10) != (long)getpid()) return 0;
  if (!u_parse_number(fds, SRV_LISTENERS, &n))
    cli_failed("LISTEN_FDS: %s: too many sockets, or no number", fds);
  for (int i = 0; i < (int)n; i++)
    if (fcntl(3 + i, F_GETFD) < 0)
      cli_failed("LISTEN_FDS: %s: %d is not open", fds, 3 + i);
  return (int)n;
}

/* Listens on a private socket, in a directory that only its owner can enter.
 * The directory protects it; the mode, from the umask, is for those who look at
 * the socket alone.  A parent whose path is long is passed over, as
 * mkdtemp refuses a template that is cut: with what comes behind it the path
 * has to fit into the address of a socket on every system. */
static void cli_listen_privately(void) {
  const char *const parents[] = {getenv("XDG_RUNTIME_DIR"), getenv("TMPDIR"),
                                 "/tmp"};
  char *dir = cli.private_dir;
  for (size_t i = 0; i < COUNT_OF(parents) && !*dir; i++) {
    /* What is not set or relative is passed over. */
    const char *parent = parents[i] && *parents[i] ? parents[i] : ".";
    snprintf(dir, sizeof cli.private_dir, "%s/nbdXXXXXX", parent);
    if (*dir != '/' || !mkdtemp(dir)) *dir = '\0';
  }
  if (!*dir) cli_failed("private socket: no directory for it (use -U)");
  mode_t mask = umask(0177);
  cli_listen_at("unix:%s/sock", dir);
  umask(mask);
}

/* Opens the sockets that the command line asks for.  If it does not ask for
 * any, takes over those that were passed to us, or makes a private one.  Only
 * sockets that we have opened have a URI that we know.
 *
 * A relative path gets the working directory in front, so that the URI is right
 * from everywhere; but only where the whole fits into the address of a socket,
 * for the path alone may.  Others than this machine may use TCP: a warning. */
static void cli_listen(void) {
  const char *path = opt[OPT_UNIX].text;
  const char *host = opt[OPT_BIND].text ? opt[OPT_BIND].text : "localhost";
  int port = opt[OPT_PORT].given ? (int)opt[OPT_PORT].number : 10809;
  int wants_tcp = opt[OPT_PORT].given || opt[OPT_BIND].given;
  int is_told = path || wants_tcp || opt[OPT_STDIN].given || opt[OPT_FD].given;
  char dir[CLI_PATH_MAX + 1];
  size_t n = path ? strlen(path) : 0;
  assert(cli.client < 0 && !cli.server->nlisteners);
  if (opt[OPT_STDIN].given) cli.client = 0;
  if (opt[OPT_FD].given) cli_listen_at("fd:%d", (int)opt[OPT_FD].number);
  for (int i = 0; i < cli.passed && !is_told; i++)
    cli_listen_at("fd:%d", 3 + i);
  if (path ? strcmp(path, "-") == 0
           : !is_told && !cli.passed && !opt[OPT_CONNECT].given)
    cli_listen_privately();
  else if (path && *path != '/' && n + 1 < sizeof dir &&
           getcwd(dir, sizeof dir - n - 1))
    cli_listen_at("unix:%s/%s", dir, path);
  else if (path)
    cli_listen_at("unix:%s", path);
  if (wants_tcp) cli_listen_at("tcp:%s:%d", host, port);
  if (wants_tcp && strcmp(host, "localhost") != 0 && strcmp(host, "::1") != 0 &&
      strncmp(host, "127.", 4) != 0 && !opt[OPT_QUIET].given)
    cli_say("%s: no authentication: anyone can read and write", host);
  int err = nbdserve_uri(cli.server, cli.export_name, cli.uri, sizeof cli.uri);
  if (err != -ENOENT) cli_exit_if_error(err, "URI");
}

/* ---- The kernel's device (--connect) ---------------------------------------
 * The kernel is given one end of a socket pair, and a thread serves the other.
 * It keeps the device when this process dies: requests then wait for a minute,
 * in which a new server of the same target takes over (OS_NBD_RECONFIGURE), and
 * what is mounted notices nothing. */

/* N of /dev/nbdN */
#define CLI_DEVICE ((uint32_t)opt[OPT_CONNECT].number)

/* The thread that serves the kernel.  When that has closed the connection the
 * device was disconnected, by us or by somebody else, and the server ends.
 * What was wrong with a request its answer has said, and cli_close looks
 * whether there was any; what could not be made durable cli_disconnect and
 * nbdserve_run find. */
static void *cli_serve_kernel(void *socket) {
  int fd = (int)(intptr_t)socket;
  os_serve_writeback();
  nbdserve_serve(cli.server, fd, fd, cli.export_name);
  close(fd);
  cli.is_connected = 0; /* before cli_serve goes on, and would disconnect it */
  nbdserve_stop(cli.server);
  cli_count(-1, 0);
  return NULL;
}

/* Opens our own device, with flags besides O_RDONLY, and calls `use` with the
 * descriptor.  0 or -errno.
 *
 * A process that waits for the device cannot be killed, and this one has to
 * answer what it waits for.  So a child waits, which has closed all that it has
 * of us: if we are killed, our socket and lock go with us, a new server takes
 * over, and the child's wait ends.  Its exit status is the errno.
 *
 * The child of a process with threads may call only what a signal handler may.
 * Signals are blocked: our handler is not for the child, and nobody in a hurry
 * ends us before the data is safe.  Locks and sockets were opened early, so
 * descriptors that the loop leaves open can only be clients. */
static int cli_use_device(int flags, int (*use)(int)) {
  int status = 0;
  sigset_t all;
  sigfillset(&all);
  sigprocmask(SIG_BLOCK, &all, NULL);
  pid_t pid = fork();
  for (int i = 0; pid == 0 && i < 1 << 16; i++)
    close(i);
  if (pid <= 0) { /* without a child we wait, rather than not at all */
    int fd = open(opt[OPT_CONNECT].text, O_RDONLY | O_CLOEXEC | flags);
    status = fd < 0 || use(fd) < 0 ? errno : 0;
    if (pid == 0) _exit(status);
    if (use != close) close(fd);
  } else {
    status = waitpid(pid, &status, 0) < 0 ? errno : cli_exit_status(status);
  }
  sigprocmask(SIG_UNBLOCK, &all, NULL); /* as it was */
  return -status;
}

/* Connects the kernel's device, and returns when it can be used: opening it
 * finds its partitions.  From the start on signals leave the end to
 * cli_disconnect; if one has come before, there is nothing to connect.
 *
 * The kernel is given one end of the socket pair.  The device may have been
 * that of another process that served the same target and has died.  If that
 * one is still alive, the kernel drops our socket without an error, and we see
 * it hang up. */
static void cli_connect(void) {
  const char *path = opt[OPT_CONNECT].text;
  struct os_nbd nbd = {.owner = cli.owner, .patience = 60}; /* seconds */
  struct nbdserve_info info;
  struct stat st;
  int fd[2];
  assert(!cli.is_connected && !cli.njobs);
  if (NBDSERVE_NO_THREADS) cli_failed("--connect: built without threads");
  if (stat(path, &st) < 0 || !S_ISBLK(st.st_mode))
    cli_failed("%s: no such device (modprobe nbd makes it)", path);
  cli_exit_if_error(nbdserve_info(cli.server, cli.export_name, &info),
                    "--connect");
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd) < 0)
    cli_exit_if_error(-errno, "--connect");
  if (info.min_block > 4096 || info.max_request < 128 << 10)
    cli_usage("--block-size: --connect needs MIN <= 4K and MAX >= 128K");
  nbd.block_size = info.min_block < 512 ? 512 : info.min_block;
  nbd.size = info.size - info.size % nbd.block_size;
  nbd.flags = info.flags;
  nbd.socket = fd[1];
  if (!nbd.size) cli_failed("%s: the target has not even a sector", path);
  if (nbd.size < info.size)
    cli_say("%s: without the last " CLI_N " bytes, which are no whole sector",
            path, info.size - nbd.size);
  cli.is_connected = 1; /* a signal that came before has set `stopping` */
  if (cli.stopping) cli.is_connected = 0;
  if (cli.stopping) return;
  /* The thread comes first: the kernel may read once it has the socket. */
  cli.njobs = 1;
  struct pollfd own = {dup(fd[0]), POLLIN, 0}; /* the thread may close fd[0] */
  int err = os_thread(cli_serve_kernel, (void *)(intptr_t)fd[0]);
  if (err) cli.njobs = cli.is_connected = 0;
  cli_exit_if_error(err, "--connect");
  err = os_tell_nbd(OS_NBD_CONNECT, CLI_DEVICE, &nbd);
  int is_taken = err == -EBUSY;
  if (is_taken && os_nbd_is_owned(CLI_DEVICE))
    err = os_tell_nbd(OS_NBD_RECONFIGURE, CLI_DEVICE, &nbd);
  close(nbd.socket);
  poll(&own, 1, 0);
  close(own.fd);
  if (err || own.revents & POLLHUP) cli.is_connected = 0;
  if (is_taken && !cli.is_connected)
    cli_die(CLI_IN_USE, "%s: in use (umount and nbd-client -d %s free it)",
            path, path);
  if (err == -EPERM) cli_failed("%s: only root may connect it", path);
  if (err == -ENOENT || err == -EPROTONOSUPPORT || err == -EAFNOSUPPORT)
    cli_failed("%s: this kernel has no NBD client (modprobe nbd)", path);
  cli_exit_if_error(err, path);
  cli_use_device(0, close); /* it may have no partitions */
}

/* Disconnects the kernel's device, after all that was written to it has come
 * here: an error says that it has not.  Unless it is forced, one that is in use
 * stays, the first time. */
static int cli_disconnect(int is_forced) {
  const char *path = opt[OPT_CONNECT].text;
  if (!cli.is_connected) return 0;
  /* While the thread still serves it, what the kernel has not written yet is
   * fetched, and made durable.  O_EXCL: the kernel refuses to open it while
   * something is mounted from it. */
  int lost = cli_use_device(O_EXCL, fsync);
  int is_first = !cli.refused_ms || os_now_ms() - cli.refused_ms < 500;
  if (lost == -EBUSY && !is_forced && is_first) {
    if (!cli.refused_ms)
      cli_say("%s: mounted or in use; end that, or ask again", path);
    cli.refused_ms = os_now_ms();
    cli.stopping = 0; /* first: the handler sets it behind end_wanted */
    cli.end_wanted = 0;
    return 0;
  }
  if (lost == -EBUSY) lost = cli_use_device(0, fsync);
  if (lost) cli_say("%s: %s; written data may be lost", path, strerror(-lost));
  int err = os_tell_nbd(OS_NBD_DISCONNECT, CLI_DEVICE, NULL);
  cli.is_connected = 0; /* what the kernel has sent by then is still done */
  if (err) cli_say("%s: not disconnected: %s", path, strerror(-err));
  nbdserve_stop(cli.server);
  return lost;
}

/* ---- The command that is served (--run, --) ----------------------------- */

/* Starts the command.  It is a child of the process, not the other way round,
 * so that we can pass on its status.  The signals are blocked until its process
 * id is known to the handler: it may have ended by then, and SIGCHLD be
 * waiting.  If a signal has asked for the end already, there is nobody to serve
 * the command, so it is not started: what never ran has not succeeded.
 *
 * The child becomes the command, with the URI, or else the device, in place of
 * each {}; or says why not.  A shell command gets variables with the names that
 * nbdkit gives them, so that scripts can be used with both.  The descriptors
 * that we have opened close themselves in it. */
static void cli_start_child(void) {
  const struct srv_listener *l = cli.server->listeners;
  char nbd[sizeof l->text + 16];
  const char *colon = strrchr(l->text, ':');
  const char *program = cli.command ? *cli.command : "/bin/sh";
  const char *device = opt[OPT_CONNECT].given ? opt[OPT_CONNECT].text : "";
  const char *place = *cli.uri ? cli.uri : device; /* that it uses */
  sigset_t all;
  assert(!cli.child);
  if (!*place) cli_usage("no URI for the command to use");
  sigfillset(&all);
  sigprocmask(SIG_BLOCK, &all, NULL);
  pid_t pid = cli.stopping ? -1 : fork();
  if (pid < 0) cli.child_status = CLI_FAILED;
  if (pid < 0 && !cli.stopping) cli_exit_if_error(-errno, "fork");
  if (pid > 0) cli.child = pid;
  if (pid != 0) sigprocmask(SIG_UNBLOCK, &all, NULL); /* as it was */
  if (pid != 0) return;
  cli_catch_signals(SIG_DFL); /* it must not run our handler */
  for (char **word = cli.command; word && *word; word++) {
    const char *text = *word;
    char *copy = u_zalloc(strlen(text) * (strlen(place) + 1) + 1);
    if (!copy) _exit(127);
    for (const char *hit = strstr(text, "{}"); hit; hit = strstr(text, "{}")) {
      strcat(strncat(copy, text, (size_t)(hit - text)), place);
      text = hit + 2;
    }
    *word = strcat(copy, text);
  }
  snprintf(nbd, sizeof nbd, "nbd:%s%s", l->is_unix ? "unix:" : "", l->text);
  setenv("nbd", nbd, 1);
  setenv("uri", cli.uri, 1);
  setenv("unixsocket", l->is_unix ? l->text : "", 1);
  setenv("port", l->is_unix || !colon ? "" : colon + 1, 1);
  setenv("exportname", cli.export_name, 1);
  setenv("dev", device, 1);
  if (cli.command)
    execvp(program, cli.command);
  else
    execl(program, "sh", "-c", opt[OPT_RUN].text, (char *)NULL);
  cli_say("%s: %s", program, strerror(errno));
  _exit(127); /* as a shell says it */
}

/* ---- Getting ready ------------------------------------------------------ */

/* --fork: goes on in a child.  Only the child returns.  The parent waits for a
 * byte from it, which says that it is ready, and exits.  If the pipe is closed
 * without one, the child has failed, and the parent passes its status on.  This
 * comes before anything is opened: threads would not come along. */
static void cli_fork(void) {
  int fd[2];
  char byte;
  int wait_status = 0;
  assert(!cli.cas && !cli.server->nlisteners && cli.ready_pipe < 0);
  pid_t pid = pipe(fd) < 0 ? -1 : fork();
  if (pid < 0 || (pid == 0 && setsid() < 0)) cli_exit_if_error(-errno, "fork");
  close(fd[pid > 0]); /* the parent reads, the child writes */
  cli.ready_pipe = fd[1];
  if (pid == 0) return;
  if (read(fd[0], &byte, 1) == 1) _exit(0);
  waitpid(pid, &wait_status, 0);
  _exit(cli_exit_status(wait_status));
}

/* Takes what os_sandbox_version or os_sandbox has returned: without a sandbox
 * the process goes on, unless one is required. */
static void cli_check_sandbox(int result) {
  if (result < 0 && opt[OPT_SANDBOX].number == SANDBOX_REQUIRE)
    cli_failed("--sandbox require: not on this system, or built without: %s",
               strerror(-result));
}

/* Tells systemd, or whoever else listens at $NOTIFY_SOCKET (sd_notify(3)), that
 * we are ready.  "@" stands for the NUL of a name outside the file system. */
static void cli_notify(void) {
  const char *path = getenv("NOTIFY_SOCKET");
  struct sockaddr_un a = {.sun_family = AF_UNIX};
  if (!path || !*path || strlen(path) >= sizeof a.sun_path) return;
  strcpy(a.sun_path, path);
  if (*path == '@') *a.sun_path = '\0';
  socklen_t len =
      (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path));
  int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  sendto(fd, "READY=1", 7, MSG_NOSIGNAL, (struct sockaddr *)&a, len);
  close(fd);
}

/* --pidfile: its path may be free, or that of a symbolic link, which is
 * replaced, not followed, or of a file that is empty or has a number, as one
 * that was left behind.  One that is locked belongs to a server that runs;
 * anything else may be an image that was named by mistake.
 *
 * The descriptor stays open, for the lock and for os_remove_own_file: with it
 * closed, the inode number might become that of another server's pidfile. */
static void cli_write_pidfile(const char *path) {
  char text[32] = "";
  struct stat st;
  assert(!cli.pidfile);
  if (lstat(path, &st) == 0 && !S_ISLNK(st.st_mode)) {
    int is_small = S_ISREG(st.st_mode) && st.st_size < (off_t)sizeof text;
    int fd = is_small ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0 && os_lock_file(fd, 1) == -EBUSY)
      cli_die(CLI_IN_USE, "%s: the pidfile of a server that runs", path);
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd); /* with -1 both fail */
    if (n < 0 || strspn(text, "0123456789\n") != (size_t)st.st_size)
      cli_failed("%s: exists and is not a pidfile; not replaced", path);
  }
  cli.pidfile = cli_new_file(path, NULL);
  cli_exit_if_error(os_lock_file(cli.pidfile, 0), path);
  if (dprintf(cli.pidfile, "%ld\n", (long)getpid()) < 0)
    cli_exit_if_error(-errno, path);
  cli_put_new_file();
}

/* Prints the URI of the first socket and, if that is a unix socket, of the TCP
 * port, and the kernel's device, each in a line.  Returns a negative number if
 * that fails. */
static int cli_print_uris(int fd) {
  const struct srv_listener *l = cli.server->listeners;
  char other[sizeof cli.uri];
  int r = *cli.uri ? dprintf(fd, "%s\n", cli.uri) : 0;
  if (opt[OPT_CONNECT].given && r >= 0)
    r = dprintf(fd, "%s\n", opt[OPT_CONNECT].text);
  for (int i = 1; i < cli.server->nlisteners && r >= 0; i++)
    if (l->is_unix && !l[i].is_unix && *l[i].text &&
        !srv_uri(&l[i], cli.export_name, other, sizeof other))
      return dprintf(fd, "%s\n", other);
  return r;
}

/* Tells everybody who wants to know that all is open and we listen.  Whoever is
 * told may connect at once.  --ready-fd is closed, which is a sign in itself,
 * and the command does not get it.  A command uses the URI itself, and standard
 * output is its own.  --fork lets go of the terminal; if the parent has gone
 * there is nobody to tell. */
static void cli_tell_ready(void) {
  int fd = (int)opt[OPT_READY_FD].number;
  /* The pidfile comes first: it may fail, and nobody has been told by then. */
  if (opt[OPT_PIDFILE].given) cli_write_pidfile(opt[OPT_PIDFILE].text);
  cli_notify();
  assert(!opt[OPT_READY_FD].given || fd > 2);
  if (fd && (cli_print_uris(fd) < 0 || close(fd) < 0))
    cli_exit_if_error(-errno, "--ready-fd");
  if (opt[OPT_RUN].given)
    cli_start_child();
  else if (cli_print_uris(1) < 0 && errno != EBADF)
    /* EBADF: it was closed when we were started, so nobody wants it */
    cli_exit_if_error(-errno, "standard output");
  if (cli.ready_pipe < 0) return;
  assert(cli.ready_pipe > 2);
  int null = open("/dev/null", O_RDWR);
  for (int i = 0; i <= 2; i++)
    if (null < 0 || dup2(null, i) < 0) cli_exit_if_error(-errno, "/dev/null");
  close(null);
  (void)!write(cli.ready_pipe, "", 1);
  close(cli.ready_pipe);
}

/* ---- Serving ------------------------------------------------------------ */

/* Prints the totals so far as a JSON object; with --stats also, for each type
 * of request, how many succeeded and how many microseconds these took. */
static void cli_print_stats(void) {
  struct nbdserve_stats s;
  char types[CLI_NTYPES * 100] = "";
  size_t n = 0;
  cli.stats_wanted = 0;
  nbdserve_stats(cli.server, &s);
  os_lock(&cli.server->lock);
  for (const struct cli_word *t = cli_types; t->value < CLI_NTYPES; t++) {
    const struct cli_requests *l = &cli_requests[t->value];
    if (!l->succeeded) continue;
    n += (size_t)snprintf(types + n, sizeof types - n,
                          ",\"%s\":{\"requests\":" CLI_N ",\"mean_us\":" CLI_N
                          ",\"max_us\":" CLI_N "}",
                          t->name, l->succeeded,
                          l->total_ns / l->succeeded / 1000, l->max_ns / 1000);
    assert(n < sizeof types);
  }
  os_unlock(&cli.server->lock);
  dprintf(2,
          "{\"clients\":" CLI_N ",\"clients_now\":" CLI_N ",\"requests\":" CLI_N
          ",\"errors\":" CLI_N ",\"bytes_read\":" CLI_N
          ",\"bytes_written\":" CLI_N ",\"flushes\":" CLI_N "%s}\n",
          s.clients, s.clients_now, s.requests, s.errors, s.bytes_read,
          s.bytes_written, s.flushes, types);
}

/* Waits until no more than n threads do commands, or for the time `until`, or
 * a signal, which ends commands.  -ETIMEDOUT: there are more. */
static int cli_wait_for_jobs(int n, int64_t until) {
  os_lock(&cli.server->lock);
  while (cli.njobs > n && os_now_ms() < until && (!n || !cli.stopping))
    os_wait_ms(&cli.server->lock, 100);
  int err = cli.njobs > n ? -ETIMEDOUT : 0;
  os_unlock(&cli.server->lock);
  return err;
}

/* Serves until the end, and does what the signal handler leaves to others: it
 * prints totals, and does step 2 of the end.  A client that is the only one is
 * served here; after that nbdserve_run has nothing to do but to flush.
 *
 * Step 5 of the end: usually the command has ended, or has been told and had
 * its time.  If it has not been told (the server has failed) that is done now,
 * and there is time to wait for it.  Returns the exit status, which is the
 * command's if there was one and it has failed. */
static int cli_serve(void) {
  int err = 0;
  int run_err;
  cli_start_control();
  if (cli.client >= 0) {
    int out = opt[OPT_STDIN].given ? 1 : cli.client;
    err = nbdserve_serve(cli.server, cli.client, out, NULL);
    cli_wait_for_jobs(1, INT64_MAX); /* clients of others, and commands */
    nbdserve_stop(cli.server);
  }
  do {
    run_err = nbdserve_run(cli.server);
    int is_last = run_err != -EINTR && opt[OPT_STATS].given;
    if (cli.stats_wanted || is_last) cli_print_stats();
    if (cli.stopping && cli_disconnect(0)) err = -EIO;
    if (cli.end_wanted) nbdserve_unlisten(cli.server);
  } while (run_err == -EINTR);
  /* raise: the handler tells the command, and starts its ten seconds. */
  if (cli.child && !cli.end_wanted) raise(SIGTERM);
  while (cli.child && !cli.stopping)
    poll(NULL, 0, 100);
  if (cli.child)
    cli_failed("the command still runs after SIGTERM; not waited for");
  if (cli.child_status) return cli.child_status;
  return err || run_err ? CLI_FAILED : 0;
}

/* At exit, however that comes about: removes what we have made, first what
 * tells others that we are here, and closes what we have opened.  From here on
 * signals are ignored.
 *
 * Whoever has put another file in the place of STORE.ctl keeps that.  We have
 * the socket bound: its inode number would otherwise be free, and the other
 * file may have got it.  As long as we have not made it, ctl_st is all zero and
 * fits no file.
 *
 * Clients and commands use the store, so it is closed after they have ended:
 * cli_control and the commands see that the server has stopped.  If one does
 * not end in time, the store stays open: opening it next time repairs what is
 * unfinished. */
static void cli_close(void) {
  cli_catch_signals(SIG_IGN);
  signal(SIGCHLD, SIG_DFL); /* cli_disconnect wants to know how a child ends */
  if (cli.pidfile) os_remove_own_file(opt[OPT_PIDFILE].text, cli.pidfile);
  if (*cli.temp) unlink(cli.temp);
  os_remove_same(cli.ctl_path, &cli.ctl_st);
  if (!cli.server) return;
  int lost = cli_disconnect(1);
  nbdserve_stop(cli.server);
  int err = cli_wait_for_jobs(0, os_now_ms() + IO_GRACE_MS);
  /* The kernel may have had nobody left to tell of an error. */
  struct nbdserve_stats stats;
  nbdserve_stats(cli.server, &stats);
  if (opt[OPT_CONNECT].given && stats.errors && !lost) {
    lost = -EIO;
    cli_say("%s: a request has failed; written data may be lost",
            opt[OPT_CONNECT].text);
  }
  if (!err) nbdserve_free(cli.server);
  if (!err && cli.cas) err = nbdserve_cas_close(cli.cas);
  if (*cli.private_dir) rmdir(cli.private_dir);
  if (err) cli_say("%s: not closed in order: %s", cli.store, strerror(-err));
  if (err || lost) _exit(CLI_FAILED);
}

/* ---- The command line as a whole ---------------------------------------- */

/* --help.  README has a copy of what this prints; a test compares them. */
static void cli_help(void) {
  puts("usage: nbdserve [OPTION]... [NAME=]TARGET... [-- CMD ARG...]\n"
       "       nbdserve COMMAND ARG...        (nbdserve help COMMAND)\n"
       "Serves disks over NBD.  TARGET is a file, a block device, mem:SIZE,\n"
       "file:PATH (a file whatever its name looks like), STORE::VOLUME,\n"
       "STORE::VOLUME@SNAPSHOT or, for a whole store, STORE::.\n"
       "With CMD: serves while CMD runs; {} in an ARG becomes the URI.\n");
  for (int id = 0; id < OPT_COUNT; id++)
    cli_help_option(id);
  cli_help_verbs();
  puts("\nNumbers take K, M, G, T, P and E (powers of 1024).  Once it\n"
       "listens it prints the URI.  Exit status: 0 success, 1 failure,\n"
       "2 usage, 3 a store is damaged, 4 in use by another process, or\n"
       "the status of CMD.");
}

/* A command on a store, or a server from its start to its end: see the head of
 * this section.  The order matters: --fork before threads and locks, signals
 * before anything that must be removed, targets before sockets, so that whoever
 * can connect finds them.
 *
 * First those of the descriptors 0 to 2 are opened that are not open: otherwise
 * an image could become one of them, and our messages would be written to it.
 * What they get cannot be written, so output that nobody could see is an error.
 * The words of --version tell what the build has; without stores --help
 * has none of their commands. */
int main(int argc, char **argv) {
  for (int fd = 0; fd <= 2; fd++)
    if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDONLY) < 0)
      open("/", O_RDONLY); /* the root of a jail is empty */
  os_share_heap();
  atexit(cli_close);
  if (argc > 0) cli_parse(argv);
  const char *word = cli.ntargets == 1 ? *cli.targets : "";
  if (cli.ntargets == 2 && strcmp(*cli.targets, "help") == 0)
    return cli_help_verb(cli.targets[1]);
  if (cli.ntargets && opt[OPT_HELP].given && cli_find_verb(*cli.targets))
    return cli_help_verb(*cli.targets);
  if (strcmp(word, "help") == 0) opt[OPT_HELP].given = 1;
  if (strcmp(word, "version") == 0) opt[OPT_VERSION].given = 1;
  if (opt[OPT_HELP].given) cli_help();
  if (opt[OPT_VERSION].given)
    printf("nbdserve %s%s%s%s%s%s\n", nbdserve_version(),
           NBDSERVE_NO_FLAT ? "" : " flat", NBDSERVE_NO_CAS ? "" : " cas",
           NBDSERVE_NO_TCP ? "" : " tcp", NBDSERVE_NO_THREADS ? "" : " threads",
           NBDSERVE_POSIX_ONLY ? " posix-only" : "");
  if (opt[OPT_HELP].given || opt[OPT_VERSION].given) return cli_end_output();
  struct nbdserve_config config = {
      .version = NBDSERVE_VERSION_NUMBER,
      .threads = (uint32_t)opt[OPT_THREADS].number,
      .max_conn = (uint32_t)opt[OPT_MAX_CONN].number,
      .stall_ms = (uint32_t)opt[OPT_STALL].number * 1000,
      .idle_exit_ms = (uint32_t)opt[OPT_IDLE_EXIT].number * 1000,
      .without = (uint32_t)opt[OPT_WITHOUT].number,
      .log_level = NBDSERVE_LOG_WARNING + (int)u_min(opt[OPT_VERBOSE].given, 2),
      .log = cli_log};
  if (opt[OPT_QUIET].given) config.log_level = NBDSERVE_LOG_ERROR;
  if (opt[OPT_ONCE].given) config.flags |= NBDSERVE_CONFIG_ONCE;
  if (opt[OPT_FAULT].given || opt[OPT_DELAY].given) config.before = cli_before;
  if (opt[OPT_STATS].given) config.after = cli_after;
  cli.passed = cli_count_passed(); /* before we open one of these numbers */
  cli_exit_if_error(nbdserve_new(&cli.server, &config), "start");
  cli_run_verb();
  cli_check_options();
  if (opt[OPT_FORK].given) cli_fork();
  cli_catch_signals(cli_on_signal);
  if (opt[OPT_PARENT].given)
    cli_exit_if_error(os_end_with_parent(), "--exit-with-parent");
  for (int i = 0; i < cli.ntargets; i++)
    cli_add_target(cli.targets[i]);
  cli_check_sandbox(os_sandbox_version()); /* before anybody is told */
  cli_listen();
  if (opt[OPT_CONNECT].given) cli_connect();
  cli_tell_ready();
  /* All is open.  The command has started already, so the sandbox does not bind
   * it; the threads of a store, which cli_start_control starts, it does. */
  if (opt[OPT_SANDBOX].number != SANDBOX_OFF && !opt[OPT_CONNECT].given)
    cli_check_sandbox(os_sandbox());
  return cli_serve();
}

#endif /* !NBDSERVE_NO_MAIN */
