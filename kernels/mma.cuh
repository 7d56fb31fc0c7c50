// mma.cuh -- tensor cores as a warp uses them (compute capability 8.0): products of 16 by 8 by 16 values of bf16,
// fragments loaded from shared memory, copies into it that go on by themselves.
//
// Fragments are as PTX describes mma.m16n8k16 and ldmatrix. In lane l, with g = l / 4 and t = 2 (l % 4):
//   A (16, 16): {(g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8)}, each with the value to its right;
//   B (16, 8):  {(t, g), (t + 8, g)}, each with the value below;
//   C (16, 8):  {(g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1)}.
// The simulator does the same with what the lanes lay down for each other; sums are of f32, one product after the
// other, which a tensor core orders in its own way.
#pragma once
#include "common.cuh"

namespace mma {

// Two values rounded to bf16, `low` in the lower half, where memory has the first.
__device__ __forceinline__ unsigned pack(float low, float high) {
#ifdef CUSIM
    return (unsigned)__float2bfloat16(low).bits | (unsigned)__float2bfloat16(high).bits << 16;
#else
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#endif
}

// 2^x to within two units in the last place; 0 where that is below 2^-126.
__device__ __forceinline__ float exp2_near(float x) {
#ifdef CUSIM
    return x < -126.0f ? 0.0f : exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

#ifdef CUSIM
namespace sim {
struct Matrices {
    bf16 row[8];
};
// What ldmatrix gives a lane, `rows` being the 32 rows that all lanes name.
inline void load(unsigned (&to)[4], const bf16* row, bool turned) {
    if ((uintptr_t)row % 16 != 0) cusim::die("ldmatrix of a row that is not aligned to 16 bytes");
    Matrices rows[32];
    cusim::exchange(ALL_LANES, row, rows, sizeof(Matrices));
    int g = cusim::lane() / 4, t = cusim::lane() % 4 * 2;
    for (int i = 0; i < 4; i++) {
        bf16 first = turned ? rows[8 * i + t].row[g] : rows[8 * i + g].row[t];
        bf16 second = turned ? rows[8 * i + t + 1].row[g] : rows[8 * i + g].row[t + 1];
        to[i] = (unsigned)first.bits | (unsigned)second.bits << 16;
    }
}

struct Factors {
    unsigned a[4], b[2];
};
inline float half(unsigned both, int which) { return __uint_as_float(which ? both & 0xffff0000u : both << 16); }
inline void multiply(float (&c)[4], const Factors& own) {
    Factors all[32];
    cusim::exchange(ALL_LANES, &own, all, sizeof(Factors));
    int g = cusim::lane() / 4, t = cusim::lane() % 4 * 2;
    for (int i = 0; i < 4; i++) {
        int row = g + (i >= 2 ? 8 : 0), col = t + i % 2;
        for (int k = 0; k < 16; k++) {
            int quarter = k % 8 / 2, upper = k / 8;
            float a = half(all[row % 8 * 4 + quarter].a[row / 8 + 2 * upper], k % 2);
            float b = half(all[col * 4 + quarter].b[upper], k % 2);
            c[i] += a * b;
        }
    }
}

// A copy is made at some time until a thread waits for it: every other one at once, so that nobody may still read
// what lay there, and the rest as late as may be.
struct Copy {
    void* to;
    const void* from;
    bool there;
    int group;
};
struct Copies {
    Copy all[256];
    int n, group, total;
};
inline void make(const Copy& copy) {
    if (copy.there) memcpy(copy.to, copy.from, 16);
    else memset(copy.to, 0, 16);
}
inline Copies& copies() {
    static Copies of[1024];
    return of[threadIdx.x];
}
inline void copy(void* to, const void* from, bool there) {
    if ((uintptr_t)to % 16 != 0 || (uintptr_t)from % 16 != 0) cusim::die("a copy that is not aligned to 16 bytes");
    Copies& own = copies();
    if (own.n == 256) cusim::die("too many copies under way");
    Copy copy{to, from, there, own.group};
    if ((own.total++ + (int)threadIdx.x) % 2) make(copy);
    else own.all[own.n++] = copy;
}
inline void wait(int behind) {
    Copies& own = copies();
    int left = 0;
    for (int i = 0; i < own.n; i++) {
        Copy copy = own.all[i];
        if (copy.group >= own.group - behind) own.all[left++] = copy;
        else make(copy);
    }
    own.n = left;
}
}  // namespace sim
#else
__device__ __forceinline__ unsigned shared_address(const void* at) {
    return (unsigned)__cvta_generic_to_shared(at);
}
#endif

// c += a b.
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifdef CUSIM
    sim::multiply(c, {{a[0], a[1], a[2], a[3]}, {b0, b1}});
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four matrices of 8 by 8: lanes 8 i to 8 i + 7 name the rows of matrix i, 16 bytes each. to[i] is values
// (g, t) and (g, t + 1) of it.
__device__ __forceinline__ void load(unsigned (&to)[4], const bf16* row) {
#ifdef CUSIM
    sim::load(to, row, false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
#endif
}

// The same, each matrix turned: to[i] is its values (t, g) and (t + 1, g).
__device__ __forceinline__ void load_turned(unsigned (&to)[4], const bf16* row) {
#ifdef CUSIM
    sim::load(to, row, true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
#endif
}

// Copies 16 bytes into shared memory, or zeros where they are not there (`from` must still be an address).
__device__ __forceinline__ void copy(void* to, const void* from, bool there) {
#ifdef CUSIM
    sim::copy(to, from, there);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
#endif
}

// Ends a group of the thread's copies.
__device__ __forceinline__ void end_group() {
#ifdef CUSIM
    sim::copies().group++;
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for the thread's copies but those of the last BEHIND groups; others see them after a barrier.
template <int BEHIND> __device__ __forceinline__ void wait_groups() {
#ifdef CUSIM
    sim::wait(BEHIND);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(BEHIND) : "memory");
#endif
}

}  // namespace mma
