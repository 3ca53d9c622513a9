/* Lets system calls below a folder fail: every write, fsync, rename, link and mkdir there is counted,
   and those from the `first` to the `last` fail. Of a write that fails half is written, as on a disk
   that is full: the call returns a smaller number, and the next write gets the error.

   The kernel turns these calls into the signal SIGSYS (seccomp), and the handler makes them or not.
   Wrapping the functions of the C library would not do: Rust's libraries call the kernel themselves.
   Linux on x86-64 only. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define OURS 0x6661756c74 /* as the sixth argument, which none of these calls has: not trapped */
#define LENGTH 4096
#define COUNT(list) (sizeof(list) / sizeof(*(list)))

/* What the call names first: a file descriptor, a path, or a path after a folder's descriptor. */
enum names { DESCRIPTOR, PATH, PATH_IN };

static const struct kind {
    const char *name;
    int number, error;
    enum names names;
} kinds[] = {
    {"write", SYS_write, ENOSPC, DESCRIPTOR},     {"writev", SYS_writev, ENOSPC, DESCRIPTOR},
    {"pwrite64", SYS_pwrite64, ENOSPC, DESCRIPTOR}, {"ftruncate", SYS_ftruncate, ENOSPC, DESCRIPTOR},
    {"fsync", SYS_fsync, EIO, DESCRIPTOR},        {"fdatasync", SYS_fdatasync, EIO, DESCRIPTOR},
    {"rename", SYS_rename, EIO, PATH},            {"renameat", SYS_renameat, EIO, PATH_IN},
    {"renameat2", SYS_renameat2, EIO, PATH_IN},   {"link", SYS_link, ENOSPC, PATH},
    {"linkat", SYS_linkat, ENOSPC, PATH_IN},      {"mkdir", SYS_mkdir, ENOSPC, PATH},
};

/* Parent and child share it. */
static struct {
    char folder[LENGTH], failed[LENGTH + 32];
    long first, last, calls;
    int half; /* whether the last call wrote half of its bytes */
} *shared;

__attribute__((constructor)) static void begin(void)
{
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

/* In the parent: which calls of the next child fail, counted from 1. */
void fail(const char *folder, long first, long last)
{
    snprintf(shared->folder, LENGTH, "%s/", folder);
    shared->first = first;
    shared->last = last;
    shared->calls = 0;
    shared->half = 0;
    shared->failed[0] = 0;
}

/* In the parent: how many calls there were, and the first that failed. */
long calls(void) { return shared->calls; }
const char *failed(void) { return shared->failed; }

static long make_call(int number, const greg_t *r, long third)
{
    long result = syscall(number, r[REG_RDI], r[REG_RSI], third, r[REG_R10], r[REG_R8], OURS);
    return result == -1 ? -errno : result;
}

static int fails(const struct kind *kind, const greg_t *r)
{
    char link[64], path[LENGTH] = "";
    const char *named = (const char *)r[kind->names == PATH ? REG_RDI : REG_RSI];
    if (kind->names == DESCRIPTOR) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", (int)r[REG_RDI]);
        if (readlink(link, path, LENGTH - 1) < 0)
            return 0;
        named = path;
    }
    /* The folder itself counts too: its fsync. */
    size_t length = strlen(shared->folder);
    int is_folder = strlen(named) == length - 1;
    if (strncmp(named, shared->folder, is_folder ? length - 1 : length) != 0)
        return 0;
    if (shared->half && kind->number == SYS_write)
        return 1;
    long call = __atomic_add_fetch(&shared->calls, 1, __ATOMIC_SEQ_CST);
    if (call == shared->first)
        snprintf(shared->failed, sizeof shared->failed, "%s %s", kind->name, named);
    return call >= shared->first && call <= shared->last;
}

static void on_call(int signal, siginfo_t *info, void *context)
{
    (void)signal;
    int saved = errno;
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    const struct kind *kind = kinds;
    while (kind->number != info->si_syscall)
        kind++;
    if (!fails(kind, r)) {
        r[REG_RAX] = make_call(kind->number, r, r[REG_RDX]);
    } else if (kind->number == SYS_write && !shared->half && r[REG_RDX] > 1) {
        shared->half = 1;
        r[REG_RAX] = make_call(SYS_write, r, r[REG_RDX] / 2);
    } else {
        shared->half = 0;
        r[REG_RAX] = -kind->error;
    }
    errno = saved;
}

/* In the child: begin to count. Returns 0, or -1 where the kernel does not allow it. */
int trap(void)
{
    struct sigaction action = {.sa_sigaction = on_call, .sa_flags = SA_SIGINFO | SA_NODEFER};
    struct sock_filter filter[5 + COUNT(kinds)];
    int n = 0, end = COUNT(filter) - 1;
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                                               offsetof(struct seccomp_data, args[5]));
    filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)OURS,
                                               COUNT(kinds) + 1, 0);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                                               offsetof(struct seccomp_data, nr));
    for (size_t i = 0; i < COUNT(kinds); i++, n++)
        filter[n] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, kinds[i].number,
                                                 end - n - 1, 0);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
    struct sock_fprog program = {.len = n, .filter = filter};
    sigaction(SIGSYS, &action, NULL);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return -1;
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}
