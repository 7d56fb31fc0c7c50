// threads.cpp -- the blocks and threads of the simulator.
#include "cusim.h"

#include <cstdio>
#include <cstdlib>
#include <unistd.h>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cusim {
Index thread_idx, block_idx;
dim3 block_dim, grid_dim;
unsigned char* dynamic_shared;
Kernel* Kernel::first = nullptr;

namespace {
enum State : uint8_t { READY, AT_BLOCK, AT_WARP, DONE };

// Stacks are as large as kernels' local arrays may need, and only touched where they are used. They are no power of
// two apart: what all threads use would lie in the same few lines of the caches.
constexpr size_t STACK_BYTES = (64 << 10) + 17 * 64;

struct Fibre {
    State state;
    unsigned lanes;     // of the warp's meeting
    const void* where;  // of the block's meeting
    int place;          // of its last shuffle
#ifdef __x86_64__
    void* stack;
#else
    ucontext_t context;
#endif
};

// Whose turn it is when several threads can go on.
struct Schedule {
    unsigned seed;
    unsigned state;
    std::vector<int> order;

    void start(int n, unsigned block) {
        order.resize(n);
        for (int i = 0; i < n; i++) order[i] = i;
        state = seed * 2654435761u + block * 40503u + 1;
    }
    // 0: as they are numbered; 1: backwards, and the last warp goes on as far as the block's next barrier, then
    // the one before it; further seeds: at random, anew each round.
    bool warp_by_warp() const { return seed == 1; }
    void next() {
        for (size_t i = order.size(); seed > 1 && i-- > 1;) {
            state = state * 1664525u + 1013904223u;
            std::swap(order[i], order[(state >> 8) % (i + 1)]);
        }
    }
};

Kernel* kernel;
void** arguments;
int current;
std::vector<Fibre> fibres;
unsigned char* stacks;
size_t stacks_bytes;
Schedule schedule;
// What each lane has laid down for the others, by warp.
unsigned char slots[32][32][64];
uint64_t shuffles[32][3][32];

#ifdef __x86_64__
void* main_stack;
extern "C" void cusim_switch(void** save, void* load);
asm(R"(
.text
.globl cusim_switch
.type cusim_switch,@function
cusim_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi); movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
void back() { cusim_switch(&fibres[current].stack, main_stack); }
void forth(int thread) { cusim_switch(&main_stack, fibres[thread].stack); }
#else
ucontext_t main_context;
void back() { swapcontext(&fibres[current].context, &main_context); }
void forth(int thread) { swapcontext(&main_context, &fibres[thread].context); }
#endif

void body() {
    kernel->call(arguments);
    fibres[current].state = DONE;
    back();
    abort();
}

void make(int thread) {
    Fibre& fibre = fibres[thread];
    fibre.state = READY;
    fibre.place = 0;
    unsigned char* bottom = stacks + thread * STACK_BYTES;
#ifdef __x86_64__
    // As cusim_switch leaves it: six registers and where to go on; the stack is aligned as after a call.
    void** top = reinterpret_cast<void**>(bottom + STACK_BYTES);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&body);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fibre.stack = top;
#else
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = bottom;
    fibre.context.uc_stack.ss_size = STACK_BYTES;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, body, 0);
#endif
}

// Lets warps from thread `begin` on go on all of whose lanes have arrived.
bool release_warps(int begin, int n) {
    bool released = false;
    for (int at = begin; at < n; at++) {
        Fibre& fibre = fibres[at];
        if (fibre.state != AT_WARP) continue;
        int first = at & ~31;
        bool all = true;
        for (int lane = 0; lane < 32; lane++) {
            if (!((fibre.lanes >> lane) & 1)) continue;
            current = at;
            if (first + lane >= n || fibres[first + lane].state == DONE) die("a warp waits for a lane that has ended or is none");
            if (fibres[first + lane].state != AT_WARP) { all = false; break; }
            if (fibres[first + lane].lanes != fibre.lanes) die("lanes of a warp name different masks");
        }
        if (!all) continue;
        unsigned lanes = fibre.lanes;
        for (int lane = 0; lane < 32; lane++)
            if ((lanes >> lane) & 1) fibres[first + lane].state = READY;
        released = true;
    }
    return released;
}

// Lets the block go on when all of its threads have arrived at one barrier; says whether it has ended.
bool release_block(int n, bool& released) {
    int done = 0, waiting = 0;
    const void* where = nullptr;
    bool apart = false;
    for (int at = 0; at < n; at++) {
        Fibre& fibre = fibres[at];
        if (fibre.state == DONE) done++;
        if (fibre.state != AT_BLOCK) continue;
        if (waiting++ == 0) where = fibre.where;
        apart |= fibre.where != where;
        current = at;
    }
    if (done == n) return true;
    if (waiting > 0 && waiting + done == n) {
        if (done > 0) die("__syncthreads after threads of the block have ended");
        if (apart) die("threads wait at different __syncthreads");
        for (int at = 0; at < n; at++) fibres[at].state = READY;
        released = true;
    }
    return false;
}

// Lets a thread go on if it can.
bool run_thread(int thread) {
    if (fibres[thread].state != READY) return false;
    current = thread;
    thread_idx = {thread % block_dim.x, thread / block_dim.x % block_dim.y, thread / (block_dim.x * block_dim.y)};
    forth(thread);
    return true;
}

void run_block(int n, unsigned block) {
    fibres.resize(n);
    for (int at = 0; at < n; at++) make(at);
    schedule.start(n, block);
    for (bool moved = true;;) {
        if (!moved) die("threads wait for each other");
        moved = false;
        if (schedule.warp_by_warp()) {
            for (int begin = (n - 1) & ~31; begin >= 0; begin -= 32) {
                int end = std::min(n, begin + 32);
                for (bool goes_on = true; goes_on; moved |= goes_on) {
                    goes_on = false;
                    for (int thread = end; thread-- > begin;) goes_on |= run_thread(thread);
                    goes_on |= release_warps(begin, end);
                }
            }
        } else {
            schedule.next();
            for (int thread : schedule.order) moved |= run_thread(thread);
            moved |= release_warps(0, n);
        }
        if (release_block(n, moved)) return;
    }
}

void wait(State state) {
    fibres[current].state = state;
    int self = current;
    Index index = thread_idx;
    back();
    current = self;
    thread_idx = index;
}
}  // namespace

void die(const char* what) {
    // As a handler of signals this has a few pages of stack, less than fprintf takes.
    static char text[512];
    int n = snprintf(text, sizeof text, "cusim: %s, block (%u, %u, %u), thread %d: %s\n", kernel ? kernel->name : "?", block_idx.x, block_idx.y, block_idx.z, current, what);
    if (write(2, text, std::min((size_t)n, sizeof text - 1)) < 0) {}
    abort();
}

int lane() { return current & 31; }

__attribute__((noinline)) void block_barrier() {
    fibres[current].where = __builtin_return_address(0);
    wait(AT_BLOCK);
}

void warp_barrier(unsigned lanes) {
    if (!((lanes >> lane()) & 1)) die("a lane waits that its mask does not name");
    fibres[current].lanes = lanes;
    wait(AT_WARP);
}

void* shuffled(int lane, int place) { return &shuffles[current >> 5][place][lane]; }

int turn() {
    int& place = fibres[current].place;
    place = 1 - place;
    return place;
}

void exchange(unsigned lanes, const void* own, void* all, size_t size) {
    if (size > sizeof slots[0][0]) die("an exchange of more than 64 bytes a lane");
    int warp = current >> 5;
    memcpy(slots[warp][lane()], own, size);
    warp_barrier(lanes);
    for (int from = 0; from < 32; from++) memcpy(static_cast<unsigned char*>(all) + from * size, slots[warp][from], size);
    // Nobody lays down the next before all have read.
    warp_barrier(lanes);
}

// ------------------------------------------------------------------------- for the launching side

extern "C" Kernel* cusim_find(const char* name, size_t length) {
    for (Kernel* at = Kernel::first; at; at = at->next)
        if (strlen(at->name) == length && memcmp(at->name, name, length) == 0) return at;
    return nullptr;
}

// Names of all kernels, one a call; the number of them.
extern "C" size_t cusim_names(const char** names, size_t capacity) {
    size_t n = 0;
    for (Kernel* at = Kernel::first; at; at = at->next, n++)
        if (n < capacity) names[n] = at->name;
    return n;
}

extern "C" int cusim_threads(const Kernel* of) { return of->threads; }
extern "C" int cusim_arguments(const Kernel* of, const int** kinds) {
    *kinds = of->kinds;
    return of->n_arguments;
}

// Runs a kernel on blocks of its threads; one at a time in a process. `at` points to each argument.
extern "C" void cusim_launch(Kernel* of, const unsigned grid[3], size_t shared_bytes, void** at, unsigned seed) {
    kernel = of;
    arguments = at;
    schedule.seed = seed;
    grid_dim = dim3(grid[0], grid[1], grid[2]);
    block_dim = dim3(of->threads);
    size_t bytes = (of->threads * STACK_BYTES + 4095) / 4096 * 4096;
    if (bytes > stacks_bytes) {
        free(stacks);
        stacks = static_cast<unsigned char*>(aligned_alloc(4096, bytes));
        stacks_bytes = bytes;
    }
    dynamic_shared = static_cast<unsigned char*>(aligned_alloc(128, (shared_bytes + 255) / 128 * 128));
    unsigned block = 0;
    for (block_idx.z = 0; block_idx.z < grid[2]; block_idx.z++)
        for (block_idx.y = 0; block_idx.y < grid[1]; block_idx.y++)
            for (block_idx.x = 0; block_idx.x < grid[0]; block_idx.x++) {
                // Nothing is there that a block has not written.
                memset(dynamic_shared, 0xcd, shared_bytes);
                run_block(of->threads, block++);
            }
    free(dynamic_shared);
    kernel = nullptr;
}
}  // namespace cusim
