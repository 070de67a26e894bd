// Vectors of the width that this translation unit is compiled for, and the storage types of images.
//
// Each kernel source is compiled once per instruction set, in a namespace of that name. Nothing here may be shared
// between translation units, so the kernels use no function templates of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace jfbfast {
namespace JFBFAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#if defined(__GNUC__)
template <class T, int N>
struct VectorOf {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));
template <class To, class From>
inline To convert(From v) {
    return __builtin_convertvector(v, To);
}
#else  // a compiler without vector extensions gets vectors of one lane
template <class T, int N>
struct VectorOf {
    typedef T type;
};
template <class T>
constexpr int kLanes = 1;
template <class To, class From>
inline To convert(From v) {
    return static_cast<To>(v);
}
#endif

template <class T>
using Vec = typename VectorOf<T, kLanes<T>>::type;

template <class To, class From>
inline To bits_as(From v) {
    static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
    To out;
    std::memcpy(&out, &v, sizeof out);
    return out;
}

// Widens 16-bit lanes to 32 bits, and takes the upper halves of 32-bit lanes. The specialisations use an instruction
// that the compiler does not find (in its masked form, since GCC's headers warn about the other one).
template <int N>
struct Lanes16 {
    typedef typename VectorOf<std::uint16_t, N>::type Narrow;
    typedef typename VectorOf<std::uint32_t, N>::type Wide;
    static Wide widen(Narrow v) { return convert<Wide>(v); }
    static Narrow high_half(Wide v) { return convert<Narrow>(v >> 16); }
};

#if defined(__AVX512F__)
template <>
struct Lanes16<16> {
    typedef VectorOf<std::uint16_t, 16>::type Narrow;
    typedef VectorOf<std::uint32_t, 16>::type Wide;
    static Wide widen(Narrow v) { return bits_as<Wide>(_mm512_maskz_cvtepu16_epi32(0xffff, bits_as<__m256i>(v))); }
    static Narrow high_half(Wide v) {
        return bits_as<Narrow>(_mm512_maskz_cvtepi32_epi16(0xffff, bits_as<__m512i>(v >> 16)));
    }
};
#endif

#if defined(__AVX2__)
template <>
struct Lanes16<8> {
    typedef VectorOf<std::uint16_t, 8>::type Narrow;
    typedef VectorOf<std::uint32_t, 8>::type Wide;
    static Wide widen(Narrow v) { return bits_as<Wide>(_mm256_cvtepu16_epi32(bits_as<__m128i>(v))); }
    static Narrow high_half(Wide v) { return convert<Narrow>(v >> 16); }
};
#endif

// Converts N lanes of the storage type S to a vector of the arithmetic type W, and back.
template <class S, class W, int N>
struct Storage;

template <class T, int N>
struct Storage<T, T, N> {
    typedef typename VectorOf<T, N>::type Raw;
    typedef Raw Wide;
    static Wide widen(Raw v) { return v; }
    static Raw narrow(Wide v) { return v; }
};

template <int N>
struct Storage<bfloat16, float, N> {
    typedef typename VectorOf<std::uint16_t, N>::type Raw;
    typedef typename VectorOf<float, N>::type Wide;
    typedef typename VectorOf<std::uint32_t, N>::type Bits;

    static Wide widen(Raw v) { return bits_as<Wide>(Lanes16<N>::widen(v) << 16); }
    static Raw narrow(Wide v) {  // to nearest even; a NaN stays one
        const Bits bits = bits_as<Bits>(v);
        const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
        return Lanes16<N>::high_half((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded);
    }
};

template <int N>
struct Storage<bfloat16, double, N> {
    typedef Storage<bfloat16, float, N> Float;
    typedef typename Float::Raw Raw;
    typedef typename VectorOf<double, N>::type Wide;

    static Wide widen(Raw v) { return convert<Wide>(Float::widen(v)); }
    static Raw narrow(Wide v) { return Float::narrow(convert<typename Float::Wide>(v)); }
};

template <int N>
struct Storage<float16, float, N> {
    typedef typename VectorOf<std::uint16_t, N>::type Raw;
    typedef typename VectorOf<float, N>::type Wide;
    typedef typename VectorOf<std::uint32_t, N>::type Bits;

    static Wide widen(Raw v) {
        const Bits half = convert<Bits>(v);
        // The product changes the bias of the exponent. It is exact, and it also normalises subnormals.
        const Bits bits = bits_as<Bits>(bits_as<Wide>((half & 0x7fffu) << 13) * 0x1p112f);
        const Bits special = (half & 0x7c00u) == 0x7c00u ? bits | 0x7f800000u : bits;
        return bits_as<Wide>(special | ((half & 0x8000u) << 16));
    }
    static Raw narrow(Wide v) {  // to nearest even; a NaN stays one
        const Bits bits = bits_as<Bits>(v);
        const Bits magnitude = bits & 0x7fffffffu;
        // Adding 0.5 leaves a subnormal half, rounded by the addition, in the low bits.
        const Bits small = bits_as<Bits>(bits_as<Wide>(magnitude) + 0.5f) - 0x3f000000u;
        const Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        Bits half = magnitude < 0x38800000u ? small : normal;
        half = magnitude >= 0x477ff000u ? (magnitude & 0u) + 0x7c00u : half;
        half = magnitude > 0x7f800000u ? (magnitude & 0u) + 0x7e00u : half;
        return convert<Raw>(half | ((bits >> 16) & 0x8000u));
    }
};

#if defined(__F16C__)
template <>
struct Storage<float16, float, 8> {
    typedef VectorOf<std::uint16_t, 8>::type Raw;
    typedef VectorOf<float, 8>::type Wide;
    static Wide widen(Raw v) { return bits_as<Wide>(_mm256_cvtph_ps(bits_as<__m128i>(v))); }
    static Raw narrow(Wide v) { return bits_as<Raw>(_mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT)); }
};
#endif

#if defined(__AVX512F__)
template <>
struct Storage<float16, float, 16> {
    typedef VectorOf<std::uint16_t, 16>::type Raw;
    typedef VectorOf<float, 16>::type Wide;
    static Wide widen(Raw v) { return bits_as<Wide>(_mm512_maskz_cvtph_ps(0xffff, bits_as<__m256i>(v))); }
    static Raw narrow(Wide v) {
        return bits_as<Raw>(_mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
    }
};
#endif

// How many lanes of a vector lie within the row: all of them, or the first `count`.
struct Whole {};
struct Part {
    int count;
};

#if defined(__AVX512F__)
// The first lanes of 16 by a mask: a copy of a number of bytes that the compiler does not know is a call.
inline __mmask16 mask_of(Part part) { return __mmask16((1u << part.count) - 1); }
inline void load_lanes(VectorOf<float, 16>::type& raw, const float* p, Part part) {
    raw = bits_as<VectorOf<float, 16>::type>(_mm512_maskz_loadu_ps(mask_of(part), p));
}
inline void load_lanes(VectorOf<std::uint16_t, 16>::type& raw, const bfloat16* p, Part part) {
    raw = bits_as<VectorOf<std::uint16_t, 16>::type>(_mm256_maskz_loadu_epi16(mask_of(part), p));
}
inline void store_lanes(float* p, const VectorOf<float, 16>::type& raw, Part part) {
    _mm512_mask_storeu_ps(p, mask_of(part), bits_as<__m512>(raw));
}
inline void store_lanes(bfloat16* p, const VectorOf<std::uint16_t, 16>::type& raw, Part part) {
    _mm256_mask_storeu_epi16(p, mask_of(part), bits_as<__m256i>(raw));
}
#endif

#if defined(__AVX2__)
inline __m256i mask_of_8(Part part) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(part.count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline void load_lanes(VectorOf<float, 8>::type& raw, const float* p, Part part) {
    raw = bits_as<VectorOf<float, 8>::type>(_mm256_maskload_ps(p, mask_of_8(part)));
}
inline void store_lanes(float* p, const VectorOf<float, 8>::type& raw, Part part) {
    _mm256_maskstore_ps(p, mask_of_8(part), bits_as<__m256>(raw));
}
#endif

template <class Raw, class S>
inline void load_lanes(Raw& raw, const S* p, Part part) {
    raw = Raw{};
    std::memcpy(&raw, p, part.count * sizeof(S));
}

template <class Raw, class S>
inline void store_lanes(S* p, const Raw& raw, Part part) {
    std::memcpy(static_cast<void*>(p), &raw, part.count * sizeof(S));
}

constexpr std::size_t lane_count(Whole, int all) { return all; }
inline std::size_t lane_count(Part part, int) { return part.count; }

template <class W, int N, class S>
inline typename VectorOf<W, N>::type load_as(const S* p, Whole) {
    typename Storage<S, W, N>::Raw raw;
    std::memcpy(&raw, p, sizeof raw);
    return Storage<S, W, N>::widen(raw);
}

template <class W, int N, class S>
inline typename VectorOf<W, N>::type load_as(const S* p, Part part) {
    typename Storage<S, W, N>::Raw raw;
    load_lanes(raw, p, part);
    return Storage<S, W, N>::widen(raw);
}

template <class W, int N, class S>
inline void store_as(S* p, typename VectorOf<W, N>::type v, Whole) {
    const typename Storage<S, W, N>::Raw raw = Storage<S, W, N>::narrow(v);
    std::memcpy(static_cast<void*>(p), &raw, sizeof raw);
}

template <class W, int N, class S>
inline void store_as(S* p, typename VectorOf<W, N>::type v, Part part) {
    const typename Storage<S, W, N>::Raw raw = Storage<S, W, N>::narrow(v);
    store_lanes(p, raw, part);
}

template <class S, class P = Whole>
inline Vec<Wide<S>> load(const S* p, P lanes = {}) {
    return load_as<Wide<S>, kLanes<Wide<S>>>(p, lanes);
}

template <class S, class P = Whole>
inline void store(S* p, Vec<Wide<S>> v, P lanes = {}) {
    store_as<Wide<S>, kLanes<Wide<S>>>(p, v, lanes);
}

// Vectors of float64, and the conversion to them.
typedef Vec<double> Doubles;
constexpr int kDoubleLanes = kLanes<double>;

inline Doubles to_doubles(Doubles v) { return v; }
inline Doubles to_doubles(VectorOf<float, kDoubleLanes>::type v) {
#if defined(__AVX512F__)
    return bits_as<Doubles>(_mm512_maskz_cvtps_pd(0xff, bits_as<__m256>(v)));
#elif defined(__AVX2__)
    return bits_as<Doubles>(_mm256_cvtps_pd(bits_as<__m128>(v)));
#else
    return convert<Doubles>(v);
#endif
}

// Calls body(c, Whole or Part) for each vector of the elements [c, n).
template <int Lanes, class Body>
inline void for_each_vector(std::int64_t c, std::int64_t n, Body body) {
    for (; c + Lanes <= n; c += Lanes) body(c, Whole{});
    if (c < n) body(c, Part{int(n - c)});
}

// The sum of the lanes, always in the same order.
template <int N, class V>
inline double sum_lanes(V v) {
    double lanes[N];
    const typename VectorOf<double, N>::type wide = convert<typename VectorOf<double, N>::type>(v);
    std::memcpy(lanes, &wide, sizeof lanes);
    double sum = 0;
    for (double lane : lanes) sum += lane;
    return sum;
}

}  // namespace JFBFAST_ISA
}  // namespace jfbfast
