// glu.cu -- gated activations and their backwards: h = act(gate) up.
// Math: f32; act(x) = x / (1 + exp(-x)), or x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3).
// Launch: blocks of 256 threads that go on until all packs are done; a pack is 8 values where all lies aligned,
// and 1 elsewhere.
// Deterministic: no value depends on its neighbours. The backward's h has the bytes of the forward's: in what
// both compute no product and sum may be fused, in the one and not in the other.
// Reference: hone_kernels::Reference. Tolerance 1e-6, gradients of GeGLU 2e-6.
#include "packs.cuh"

namespace {

// act(gate) and its slope there.
struct Gated {
    float value, slope;
};

struct Swish {
    static __device__ __forceinline__ Gated of(float gate) {
        // exp(-gate) may be infinite: the sigmoid is 0 then.
        float sigmoid = 1.0f / __fadd_rn(1.0f, expf(-gate));
        return {__fmul_rn(gate, sigmoid), sigmoid * fmaf(gate, 1.0f - sigmoid, 1.0f)};
    }
};

struct Gelu {
    static __device__ __forceinline__ Gated of(float gate) {
        const float slope = 0.7978846f, cubic = 0.044715f;
        // From 8 on tanh(u) is 1 in f32, so that a gate may be held there where only tanh(u) and its slope
        // matter: cubes of large gates would overflow.
        float x = fmaxf(-8.0f, fminf(8.0f, gate));
        float t = tanhf(__fmul_rn(slope, fmaf(__fmul_rn(cubic, x), __fmul_rn(x, x), x)));
        float share = __fmul_rn(0.5f, __fadd_rn(1.0f, t)), du = slope * fmaf(3.0f * cubic, x * x, 1.0f);
        return {__fmul_rn(gate, share), fmaf(0.5f * x * ((1.0f - t) * (1.0f + t)), du, share)};
    }
};

template <int N, class Act, class G, class H>
__device__ void forward_by(const G* gate_up, H* h, i64 rows, i64 width) {
    each_pack<N>(rows, width, [&](i64 row, i64 col, i64 some) {
        const G* from = &gate_up[row * 2 * width + col];
        Pack<N> gate = load_some<N>(from, some), up = load_some<N>(from + width, some);
        for (int i = 0; i < N; i++) up.at[i] = __fmul_rn(Act::of(gate.at[i]).value, up.at[i]);
        store_some<N>(&h[row * width + col], up, some);
    });
}
template <class Act, class G, class H> __device__ void forward(const G* gate_up, H* h, i64 rows, i64 width) {
    if (packs<8>(gate_up, width) && packs<8>(h, width)) return forward_by<8, Act>(gate_up, h, rows, width);
    forward_by<1, Act>(gate_up, h, rows, width);
}

// Gates and ups become their gradients, and the output's gradient the output.
template <int N, class Act, class H, class G>
__device__ void backward_by(H* h, G* gate_up, i64 rows, i64 width) {
    each_pack<N>(rows, width, [&](i64 row, i64 col, i64 some) {
        G* to = &gate_up[row * 2 * width + col];
        H* out = &h[row * width + col];
        Pack<N> gate = load_some<N>(to, some), up = load_some<N>(to + width, some), dh = load_some<N>(out, some);
        for (int i = 0; i < N; i++) {
            Gated gated = Act::of(gate.at[i]);
            float x = up.at[i], d = dh.at[i];
            gate.at[i] = __fmul_rn(__fmul_rn(d, x), gated.slope);
            up.at[i] = __fmul_rn(d, gated.value);
            dh.at[i] = __fmul_rn(gated.value, x);
        }
        store_some<N>(to, gate, some);
        store_some<N>(to + width, up, some);
        store_some<N>(out, dh, some);
    });
}
template <class Act, class H, class G> __device__ void backward(H* h, G* gate_up, i64 rows, i64 width) {
    if (packs<8>(gate_up, width) && packs<8>(h, width)) return backward_by<8, Act>(h, gate_up, rows, width);
    backward_by<1, Act>(h, gate_up, rows, width);
}

}  // namespace

#define FOR_XY(X, x_, Y, y_)                                                                              \
    KERNEL(256, swiglu_##x_##_##y_, (const X* gate_up, Y* h, i64 rows, i64 width),                        \
           forward<Swish>(gate_up, h, rows, width))                                                       \
    KERNEL(256, geglu_##x_##_##y_, (const X* gate_up, Y* h, i64 rows, i64 width),                         \
           forward<Gelu>(gate_up, h, rows, width))                                                        \
    KERNEL(256, swiglu_backward_##x_##_##y_, (X* h, Y* gate_up, i64 rows, i64 width),                     \
           backward<Swish>(h, gate_up, rows, width))                                                      \
    KERNEL(256, geglu_backward_##x_##_##y_, (X* h, Y* gate_up, i64 rows, i64 width),                      \
           backward<Gelu>(h, gate_up, rows, width))

FOR_XY(float, f32, float, f32)
FOR_XY(float, f32, bf16, bf16)
FOR_XY(bf16, bf16, float, f32)
FOR_XY(bf16, bf16, bf16, bf16)
