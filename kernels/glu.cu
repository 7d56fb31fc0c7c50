// glu.cu -- gated activations, forward and backward in place: rows of I gates and I ups.
// Math: h = act(gate) up, act being SiLU (Shazeer 2020) or GELU by its tanh formula. The backward writes the gradient over gates
// and ups, and the output over the gradient that it has read: what follows needs it, and need not keep it.
// Launch: blocks of 256 threads that go on until all is done, four values a thread where rows allow it.
// Deterministic: no value depends on another. Bytes: forward 3 values read or written a gate, backward 6.
// Reference: hone_kernels::Reference, 1e-6 (GeGLU's gradient 2e-6).
#include "common.cuh"

namespace {

struct Silu {
    float out, slope;
    __device__ explicit Silu(float g) {
        float s = 1.0f / (1.0f + expf(-g));
        out = g * s;
        slope = s * (1.0f + g * (1.0f - s));
    }
};

struct Gelu {
    float out, slope;
    __device__ explicit Gelu(float g) {
        const float root = 0.79788456f, cubic = 0.044715f;  // sqrt(2 / pi)
        float t = tanhf(root * (g + cubic * g * g * g));
        out = 0.5f * g * (1.0f + t);
        // Where tanh is flat its slope is nothing, however large what it is multiplied by.
        float flat = 1.0f - t * t;
        float bend = flat == 0.0f ? 0.0f : 0.5f * g * flat * (root * (1.0f + 3.0f * cubic * g * g));
        slope = 0.5f * (1.0f + t) + bend;
    }
};

template <class Act> __device__ float forward_one(float gate, float up) { return Act(gate).out * up; }

// Overwrites gate, up and the output's gradient.
template <class Act> __device__ void backward_one(float& gate, float& up, float& h) {
    Act act(gate);
    float dh = h;
    h = act.out * up;
    gate = dh * up * act.slope;
    up = dh * act.out;
}

template <class Act, class G, class H> __device__ void forward(const G* gate_up, i64 rows, i64 width, H* h, bool wide) {
    i64 step = wide ? 4 : 1, across = width / step;
    for (i64 i = thread_index(); i < rows * across; i += n_threads()) {
        i64 row = i / across, col = (i - row * across) * step;
        const G* gate = gate_up + row * 2 * width + col;
        H* to = h + row * width + col;
        if (wide) {
            float4 g = load4(gate), u = load4(gate + width);
            store4(to, make_float4(forward_one<Act>(g.x, u.x), forward_one<Act>(g.y, u.y), forward_one<Act>(g.z, u.z),
                                   forward_one<Act>(g.w, u.w)));
        } else {
            put(to, forward_one<Act>(value(gate[0]), value(gate[width])));
        }
    }
}

template <class Act, class H, class G> __device__ void backward(H* h, i64 rows, i64 width, G* gate_up, bool wide) {
    i64 step = wide ? 4 : 1, across = width / step;
    for (i64 i = thread_index(); i < rows * across; i += n_threads()) {
        i64 row = i / across, col = (i - row * across) * step;
        G* gate = gate_up + row * 2 * width + col;
        H* to = h + row * width + col;
        if (wide) {
            float4 g = load4(gate), u = load4(gate + width), d = load4(to);
            backward_one<Act>(g.x, u.x, d.x);
            backward_one<Act>(g.y, u.y, d.y);
            backward_one<Act>(g.z, u.z, d.z);
            backward_one<Act>(g.w, u.w, d.w);
            store4(gate, g);
            store4(gate + width, u);
            store4(to, d);
        } else {
            float g = value(gate[0]), u = value(gate[width]), d = value(to[0]);
            backward_one<Act>(g, u, d);
            put(gate, g);
            put(gate + width, u);
            put(to, d);
        }
    }
}

}  // namespace

#define FOR_XY(X, x_, Y, y_)                                                                            \
    KERNEL(256, swiglu_##x_##_##y_, (const X* gate_up, i64 rows, i64 width, Y* h, int wide),            \
           forward<Silu>(gate_up, rows, width, h, wide))                                                \
    KERNEL(256, geglu_##x_##_##y_, (const X* gate_up, i64 rows, i64 width, Y* h, int wide),             \
           forward<Gelu>(gate_up, rows, width, h, wide))                                                \
    KERNEL(256, swiglu_backward_##x_##_##y_, (X* h, i64 rows, i64 width, Y* gate_up, int wide),         \
           backward<Silu>(h, rows, width, gate_up, wide))                                               \
    KERNEL(256, geglu_backward_##x_##_##y_, (X* h, i64 rows, i64 width, Y* gate_up, int wide),          \
           backward<Gelu>(h, rows, width, gate_up, wide))
FOR_XY(float, f32, float, f32)
FOR_XY(float, f32, bf16, bf16)
FOR_XY(bf16, bf16, float, f32)
FOR_XY(bf16, bf16, bf16, bf16)
