// memory.cpp -- device memory of the simulator: what lies behind a buffer may not be touched.
//
// Each buffer ends where a page begins that nobody may read or write; up to 15 bytes between the two are
// filled with a mark that is looked at when the buffer is freed. A kernel that strays is named, with its block
// and thread.
#include "cusim.h"

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <unistd.h>

namespace cusim {
namespace {
constexpr unsigned char MARK = 0xa5;
constexpr size_t ALIGN = 16;

size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }
size_t page() { return (size_t)sysconf(_SC_PAGESIZE); }

struct sigaction old_segv, old_bus;
void stray(int, siginfo_t*, void*) { die("reads or writes outside of a buffer"); }
}  // namespace

extern "C" void* cusim_alloc(size_t bytes) {
    size_t room = up(up(bytes, ALIGN), page()) + page();
    void* all = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return nullptr;
    unsigned char* end = static_cast<unsigned char*>(all) + room - page();
    mprotect(end, page(), PROT_NONE);
    unsigned char* start = end - up(bytes, ALIGN);
    memset(start + bytes, MARK, up(bytes, ALIGN) - bytes);
    return start;
}

extern "C" void cusim_free(void* start, size_t bytes) {
    unsigned char* at = static_cast<unsigned char*>(start);
    for (size_t i = bytes; i < up(bytes, ALIGN); i++)
        if (at[i] != MARK) {
            fprintf(stderr, "cusim: a kernel wrote %zu bytes behind a buffer of %zu bytes\n", i - bytes + 1, bytes);
            abort();
        }
    size_t room = up(up(bytes, ALIGN), page()) + page();
    munmap(at + up(bytes, ALIGN) + page() - room, room);
}

// While a kernel runs, its strayed reads and writes are named.
extern "C" void cusim_watch(int on) {
    struct sigaction action = {};
    action.sa_sigaction = stray;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, on ? &action : &old_segv, on ? &old_segv : nullptr);
    sigaction(SIGBUS, on ? &action : &old_bus, on ? &old_bus : nullptr);
}
}  // namespace cusim
