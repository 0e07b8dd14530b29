/* Decisions about the operating system that only the C preprocessor can make: constants that old headers lack, and
   stand-ins, under the system's own names, for calls that a system lacks. A stand-in fails with ENOSYS,
   like a system call that the kernel does not know. Only posix.pyx and windows.pyx (with the files that they include)
   may include this header. */
#ifndef LINMEM_OS_COMPAT_H
#define LINMEM_OS_COMPAT_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)

#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <io.h>
#include <stdlib.h>
#include <windows.h>
#define PSAPI_VERSION 2 /* QueryWorkingSetEx is in kernel32, so no other library has to be linked */
#include <psapi.h>

#if defined(__MINGW32__) /* some of its headers lack this function; its C library has the function */
_CRTIMP _invalid_parameter_handler __cdecl
_set_thread_local_invalid_parameter_handler(_invalid_parameter_handler handler);
#endif

#else

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/vfs.h>
#define LINMEM_LINUX 1
#else
#define LINMEM_LINUX 0
#endif

/* Constants of newer headers. On systems other than Linux the values are never passed to the kernel. */
#ifndef MAP_ANONYMOUS
#define MAP_ANONYMOUS MAP_ANON
#endif
#ifndef MAP_NORESERVE /* FreeBSD lacks the flag, because FreeBSD never accounts for pages in advance */
#define MAP_NORESERVE 0
#endif
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#ifndef MREMAP_MAYMOVE
#define MREMAP_MAYMOVE 1
#define MREMAP_FIXED 2
#endif
#ifndef MADV_HUGEPAGE
#define MADV_HUGEPAGE 14
#define MADV_NOHUGEPAGE 15
#endif
#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif
#ifndef F_ADD_SEALS
#define F_ADD_SEALS 1033
#define F_GET_SEALS 1034
#define F_SEAL_SEAL 1
#define F_SEAL_SHRINK 2
#define F_SEAL_GROW 4
#define F_SEAL_WRITE 8
#endif
#ifndef FALLOC_FL_KEEP_SIZE
#define FALLOC_FL_KEEP_SIZE 1
#define FALLOC_FL_PUNCH_HOLE 2
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8
#endif
#ifndef O_TMPFILE
#define O_TMPFILE 0
#endif
#ifndef SEEK_DATA /* lseek() refuses this value, as on a file system that does not report its holes */
#define SEEK_DATA -1
#define SEEK_HOLE -1
#endif
#ifndef RLIMIT_AS /* OpenBSD has RLIMIT_DATA only */
#define RLIMIT_AS RLIMIT_DATA
#endif
#ifndef CLOCK_MONOTONIC_COARSE
#define CLOCK_MONOTONIC_COARSE CLOCK_MONOTONIC
#endif
#ifndef _SC_PHYS_PAGES
#define _SC_PHYS_PAGES -1
#endif
#ifndef TMPFS_MAGIC
#define TMPFS_MAGIC 0x01021994
#endif
#ifndef PAGEMAP_SCAN /* struct pm_scan_arg has this size */
#define PAGEMAP_SCAN _IOWR('f', 16, uint64_t[12])
#endif

/* An old C library lacks memfd_create() although the kernel has the system call, and newer headers may hide it. */
#ifndef MFD_CLOEXEC
#define MFD_CLOEXEC 1
#define MFD_ALLOW_SEALING 2
#endif
static inline int linmem_memfd_create(const char *name, unsigned int flags) {
#if LINMEM_LINUX && defined(SYS_memfd_create)
    return (int)syscall(SYS_memfd_create, name, flags);
#else
    (void)name, (void)flags, errno = ENOSYS;
    return -1;
#endif
}

/* What a signal handler reads from its context: where the instruction is, and how it accesses memory (FAULT_ in
   pages.pxd). */
#if LINMEM_LINUX && defined(SYS_rt_tgsigqueueinfo) && (defined(__x86_64__) || defined(__aarch64__))
#include <signal.h>
#include <ucontext.h>
#define LINMEM_CAN_REPORT_FAULTS 1
static inline size_t linmem_fault_pc(void *context) {
#if defined(__x86_64__)
    return (size_t)((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
#else
    return (size_t)((ucontext_t *)context)->uc_mcontext.pc;
#endif
}
static inline int linmem_fault_access(void *context) {
#if defined(__x86_64__)
    long long error = ((ucontext_t *)context)->uc_mcontext.gregs[REG_ERR];
    return error & 16 ? 3 : error & 2 ? 2 : 1;
#else
    return (void)context, 0;
#endif
}
static inline long long linmem_thread_id(void) { return syscall(SYS_gettid); }
static inline int linmem_send_again(int signum, siginfo_t *info) { /* with the same sender and code */
    return (int)syscall(SYS_rt_tgsigqueueinfo, getpid(), syscall(SYS_gettid), signum, info);
}
#else
#include <signal.h>
#define LINMEM_CAN_REPORT_FAULTS 0
static inline size_t linmem_fault_pc(void *context) { return (void)context, 0; }
static inline int linmem_fault_access(void *context) { return (void)context, 0; }
static inline long long linmem_thread_id(void) { return 0; }
static inline int linmem_send_again(int signum, siginfo_t *info) { return (void)signum, (void)info, -1; }
#endif

/* The words may be in pages that processes share, so the operations are not the private ones. */
#define LINMEM_FUTEX_WAIT 0
#define LINMEM_FUTEX_WAKE 1
static inline long linmem_futex(int *word, int operation, int value, const struct timespec *most) {
#if LINMEM_LINUX && defined(SYS_futex)
    return syscall(SYS_futex, word, operation, value, most, NULL, 0);
#else
    (void)word, (void)operation, (void)value, (void)most, errno = ENOSYS;
    return -1;
#endif
}

#if !LINMEM_LINUX
struct linmem_sysinfo {
    unsigned long totalram, freeram, totalswap;
    unsigned int mem_unit;
};
struct linmem_statfs {
    unsigned long f_type, f_blocks, f_bavail, f_bsize;
};
static inline int linmem_sysinfo(struct linmem_sysinfo *about) { return (void)about, errno = ENOSYS, -1; }
static inline int linmem_fstatfs(int fd, struct linmem_statfs *about) {
    return (void)fd, (void)about, errno = ENOSYS, -1;
}
static inline int linmem_prctl(int option, ...) { return (void)option, errno = ENOSYS, -1; }
static inline int linmem_fallocate(int fd, off_t offset, off_t size) {
    return (void)fd, (void)offset, (void)size, ENOSYS;
}
static inline int linmem_fallocate_range(int fd, int mode, off_t offset, off_t size) {
    return (void)fd, (void)mode, (void)offset, (void)size, errno = ENOSYS, -1;
}
static inline void *linmem_mremap(void *old, size_t old_size, size_t size, int flags, ...) {
    return (void)old, (void)old_size, (void)size, (void)flags, errno = ENOSYS, MAP_FAILED;
}
#define sysinfo linmem_sysinfo
#define statfs linmem_statfs
#define fstatfs linmem_fstatfs
#define fdatasync fsync
#define prctl linmem_prctl
#define posix_fallocate linmem_fallocate
#define fallocate linmem_fallocate_range
#define mremap linmem_mremap
#endif

#endif

#endif
