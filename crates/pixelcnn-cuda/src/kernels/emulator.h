// The kernels as plain C++, for tests without a GPU: blocks run one after the other, and so do the
// threads of a block, unless they wait for one another. Then they take turns: a thread runs until it
// waits or ends.

#include <cmath>
#include <cstddef>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

typedef unsigned int u32;
typedef long long i64;

#define KERNEL static void
#define __device__ static
#define __shared__ static

__device__ u32 bits_of(float value) {
    u32 bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

__device__ float float_of(u32 bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

struct Numbers {
    u32 x, y, z;
};

static Numbers threadIdx, blockIdx, blockDim, gridDim;

__device__ i64 index() {
    return (i64)blockIdx.x * blockDim.x + threadIdx.x;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

template <class... A>
void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>());
}

template <class Block>
void each_block(const u32* blocks, u32 threads, Block block) {
    gridDim = {blocks[0], blocks[1], blocks[2]};
    blockDim = {threads, 1, 1};
    for (u32 z = 0; z < blocks[2]; z++)
        for (u32 y = 0; y < blocks[1]; y++)
            for (u32 x = 0; x < blocks[0]; x++) {
                blockIdx = {x, y, z};
                block();
            }
}

// A kernel whose threads know nothing of each other.
#define EXPORT(kernel)                                                                             \
    extern "C" void emulated_##kernel(const u32* blocks, u32 threads, void** arguments) {          \
        each_block(blocks, threads, [&] {                                                          \
            for (u32 x = 0; x < threads; x++) {                                                    \
                threadIdx = {x, 0, 0};                                                             \
                call(kernel, arguments);                                                           \
            }                                                                                      \
        });                                                                                        \
    }

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    bool ended;
};

static ucontext_t turns;
static std::vector<Thread> team;
static u32 turn;
static void (*body)(void**);
static void** body_arguments;

static void start() {
    body(body_arguments);
    team[turn].ended = true;
}

__device__ void __syncthreads() {
    u32 own = turn;
    swapcontext(&team[own].context, &turns);
    threadIdx = {own, 0, 0};
}

static void run_together(const u32* blocks, u32 threads, void (*kernel)(void**), void** arguments) {
    body = kernel;
    body_arguments = arguments;
    each_block(blocks, threads, [&] {
        team.resize(threads);
        for (Thread& thread : team) {
            thread.stack.resize(1 << 16);
            thread.ended = false;
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data();
            thread.context.uc_stack.ss_size = thread.stack.size();
            thread.context.uc_link = &turns;
            makecontext(&thread.context, start, 0);
        }
        for (bool all = false; !all;) {
            all = true;
            for (turn = 0; turn < threads; turn++) {
                if (team[turn].ended) continue;
                threadIdx = {turn, 0, 0};
                swapcontext(&turns, &team[turn].context);
                all = all && team[turn].ended;
            }
        }
    });
}

// A kernel whose threads wait for one another.
#define EXPORT_TOGETHER(kernel)                                                                    \
    extern "C" void emulated_##kernel(const u32* blocks, u32 threads, void** arguments) {          \
        run_together(blocks, threads, [](void** arguments) { call(kernel, arguments); }, arguments); \
    }

