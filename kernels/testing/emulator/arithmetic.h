// Instructions that compute each lane from the same lane of their sources.
#pragma once

#include "numbers.h"
#include "warp.h"

namespace emulator {

template <class Function, class Result, class A>
void compute_1(Warp& warp, const Instruction& instruction, Mask mask) {
    const A* a = warp.lanes<A>(instruction.inputs[0]);
    alignas(64) Result results[LANES];
    for (int lane = 0; lane < LANES; ++lane) results[lane] = Function{}(a[lane]);
    warp.store(instruction.outputs[0], results, mask);
}

template <class Function, class Result, class A, class B>
void compute_2(Warp& warp, const Instruction& instruction, Mask mask) {
    const A* a = warp.lanes<A>(instruction.inputs[0]);
    const B* b = warp.lanes<B>(instruction.inputs[1]);
    alignas(64) Result results[LANES];
    for (int lane = 0; lane < LANES; ++lane) results[lane] = Function{}(a[lane], b[lane]);
    warp.store(instruction.outputs[0], results, mask);
}

template <class Function, class Result, class A, class B, class C>
void compute_3(Warp& warp, const Instruction& instruction, Mask mask) {
    const A* a = warp.lanes<A>(instruction.inputs[0]);
    const B* b = warp.lanes<B>(instruction.inputs[1]);
    const C* c = warp.lanes<C>(instruction.inputs[2]);
    alignas(64) Result results[LANES];
    for (int lane = 0; lane < LANES; ++lane) results[lane] = Function{}(a[lane], b[lane], c[lane]);
    warp.store(instruction.outputs[0], results, mask);
}

// Enters an instruction that computes a Result from Sources by a function without state.
template <class Result, class... Sources, class Function>
void define(Table& table, const std::string& name, Function) {
    Handler run;
    if constexpr (sizeof...(Sources) == 1) run = &compute_1<Function, Result, Sources...>;
    else if constexpr (sizeof...(Sources) == 2) run = &compute_2<Function, Result, Sources...>;
    else run = &compute_3<Function, Result, Sources...>;
    enter(table, name, run, {sizeof(Result)}, {sizeof(Sources)...});
}

using Predicate = uint8_t;  // 0 or 1

template <class T>
struct TwiceAsWide;
template <> struct TwiceAsWide<uint16_t> { using type = uint32_t; };
template <> struct TwiceAsWide<int16_t> { using type = int32_t; };
template <> struct TwiceAsWide<uint32_t> { using type = uint64_t; };
template <> struct TwiceAsWide<int32_t> { using type = int64_t; };
template <> struct TwiceAsWide<uint64_t> { using type = unsigned __int128; };
template <> struct TwiceAsWide<int64_t> { using type = __int128; };

template <class T>
T quotient(T a, T b) {
    if (b == 0) return static_cast<T>(-1);
    if constexpr (std::is_signed_v<T>)
        if (b == -1) return static_cast<T>(-static_cast<std::make_unsigned_t<T>>(a));
    return a / b;
}

template <class T>
T remainder_of(T a, T b) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>)
        if (b == -1) return 0;
    return a % b;
}

template <class T>
void define_integer(Table& table, const std::string& type) {
    using U = std::make_unsigned_t<T>;  // whose overflow C++ defines
    define<T, T, T>(table, "add." + type, [](T a, T b) { return T(U(a) + U(b)); });
    define<T, T, T>(table, "sub." + type, [](T a, T b) { return T(U(a) - U(b)); });
    define<T, T, T>(table, "mul.lo." + type, [](T a, T b) { return T(uint64_t(a) * uint64_t(b)); });
    define<T, T, T, T>(table, "mad.lo." + type, [](T a, T b, T c) { return T(uint64_t(a) * uint64_t(b) + uint64_t(c)); });
    define<T, T, T>(table, "mul.hi." + type, [](T a, T b) {
        using Product = typename TwiceAsWide<T>::type;
        return T(Product(a) * Product(b) >> 8 * sizeof(T));
    });
    define<T, T, T>(table, "div." + type, [](T a, T b) { return quotient(a, b); });
    define<T, T, T>(table, "rem." + type, [](T a, T b) { return remainder_of(a, b); });
    define<T, T, T>(table, "min." + type, [](T a, T b) { return a < b ? a : b; });
    define<T, T, T>(table, "max." + type, [](T a, T b) { return a > b ? a : b; });
    define<T, T>(table, "neg." + type, [](T a) { return T(U(0) - U(a)); });
    define<T, T>(table, "abs." + type, [](T a) { return a < 0 ? T(U(0) - U(a)) : a; });
    define<T, T, uint32_t>(table, "shr." + type, [](T a, uint32_t shift) {
        constexpr uint32_t bits = 8 * sizeof(T);
        if (shift >= bits) return T(a < 0 ? -1 : 0);
        return T(a >> shift);
    });
    define<Predicate, T, T>(table, "setp.lt." + type, [](T a, T b) -> Predicate { return a < b; });
    define<Predicate, T, T>(table, "setp.le." + type, [](T a, T b) -> Predicate { return a <= b; });
    define<Predicate, T, T>(table, "setp.gt." + type, [](T a, T b) -> Predicate { return a > b; });
    define<Predicate, T, T>(table, "setp.ge." + type, [](T a, T b) -> Predicate { return a >= b; });
    define<Predicate, T, T>(table, "setp.eq." + type, [](T a, T b) -> Predicate { return a == b; });
    define<Predicate, T, T>(table, "setp.ne." + type, [](T a, T b) -> Predicate { return a != b; });
}

template <class T>
void define_widening(Table& table, const std::string& type) {
    using W = typename TwiceAsWide<T>::type;
    using U = std::make_unsigned_t<W>;
    define<W, T, T>(table, "mul.wide." + type, [](T a, T b) { return W(U(W(a)) * U(W(b))); });
    define<W, T, T, W>(table, "mad.wide." + type, [](T a, T b, W c) { return W(U(W(a)) * U(W(b)) + U(c)); });
}

template <class T>
void define_bits(Table& table, const std::string& type) {
    define<T, T, T>(table, "and." + type, [](T a, T b) { return T(a & b); });
    define<T, T, T>(table, "or." + type, [](T a, T b) { return T(a | b); });
    define<T, T, T>(table, "xor." + type, [](T a, T b) { return T(a ^ b); });
    define<T, T, T, Predicate>(table, "selp." + type, [](T a, T b, Predicate p) { return p & 1 ? a : b; });
    define<T, T>(table, "mov." + type, [](T a) { return a; });
    if constexpr (sizeof(T) > 1) {
        define<T, T>(table, "not." + type, [](T a) { return T(~a); });
        define<T, T, uint32_t>(table, "shl." + type, [](T a, uint32_t shift) {
            return shift >= 8 * sizeof(T) ? T(0) : T(a << shift);
        });
        define<Predicate, T, T>(table, "setp.eq." + type, [](T a, T b) -> Predicate { return a == b; });
        define<Predicate, T, T>(table, "setp.ne." + type, [](T a, T b) -> Predicate { return a != b; });
    }
}

// The comparisons of floats. Those that end in u also hold where one side is a NaN.
template <class T>
void define_comparisons(Table& table, const std::string& type) {
    define<Predicate, T, T>(table, "setp.eq." + type, [](T a, T b) -> Predicate { return a == b; });
    define<Predicate, T, T>(table, "setp.ne." + type, [](T a, T b) -> Predicate { return a < b || a > b; });
    define<Predicate, T, T>(table, "setp.lt." + type, [](T a, T b) -> Predicate { return a < b; });
    define<Predicate, T, T>(table, "setp.le." + type, [](T a, T b) -> Predicate { return a <= b; });
    define<Predicate, T, T>(table, "setp.gt." + type, [](T a, T b) -> Predicate { return a > b; });
    define<Predicate, T, T>(table, "setp.ge." + type, [](T a, T b) -> Predicate { return a >= b; });
    define<Predicate, T, T>(table, "setp.equ." + type, [](T a, T b) -> Predicate { return !(a < b || a > b); });
    define<Predicate, T, T>(table, "setp.neu." + type, [](T a, T b) -> Predicate { return !(a == b); });
    define<Predicate, T, T>(table, "setp.ltu." + type, [](T a, T b) -> Predicate { return !(a >= b); });
    define<Predicate, T, T>(table, "setp.leu." + type, [](T a, T b) -> Predicate { return !(a > b); });
    define<Predicate, T, T>(table, "setp.gtu." + type, [](T a, T b) -> Predicate { return !(a <= b); });
    define<Predicate, T, T>(table, "setp.geu." + type, [](T a, T b) -> Predicate { return !(a < b); });
    define<Predicate, T, T>(table, "setp.num." + type, [](T a, T b) -> Predicate { return a == a && b == b; });
    define<Predicate, T, T>(table, "setp.nan." + type, [](T a, T b) -> Predicate { return a != a || b != b; });
}

// `rounding` is what stands between the name and the type: "", ".rn", ...
template <class T>
void define_float(Table& table, const std::string& type, const std::string& rounding) {
    using W = Wide<T>;
    define<T, T, T>(table, "add" + rounding + type, [](T a, T b) { return T(W(a) + W(b)); });
    define<T, T, T>(table, "sub" + rounding + type, [](T a, T b) { return T(W(a) - W(b)); });
    define<T, T, T>(table, "mul" + rounding + type, [](T a, T b) { return T(W(a) * W(b)); });
}

template <class T>
void define_float(Table& table, const std::string& name) {
    using W = Wide<T>;
    const std::string type = "." + name;
    define_float<T>(table, type, "");
    define_float<T>(table, type, ".rn");
    define<T, T, T, T>(table, "fma.rn" + type, [](T a, T b, T c) {
        if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) return std::fma(a, b, c);
        else return T(odd_sum(double(W(a)) * double(W(b)), double(W(c))));  // the product is exact in double
    });
    define<T, T>(table, "neg" + type, [](T a) { return T(-W(a)); });
    define<T, T>(table, "abs" + type, [](T a) { return T(std::fabs(W(a))); });
    define<T, T, T>(table, "max" + type, [](T a, T b) { return T(largest<W>(a, b)); });
    define<T, T, T>(table, "min" + type, [](T a, T b) { return T(smallest<W>(a, b)); });
    define<T, T, T>(table, "max.NaN" + type, [](T a, T b) {
        return T(a != a || b != b ? std::numeric_limits<W>::quiet_NaN() : largest<W>(a, b));
    });
    define<T, T, T>(table, "min.NaN" + type, [](T a, T b) {
        return T(a != a || b != b ? std::numeric_limits<W>::quiet_NaN() : smallest<W>(a, b));
    });
    define<T, T, T, Predicate>(table, "selp" + type, [](T a, T b, Predicate p) { return p & 1 ? a : b; });
    define<T, T>(table, "mov" + type, [](T a) { return a; });
    define_comparisons<T>(table, name);
}

// Two narrow numbers in one register.
template <class T>
struct Pair {
    T low, high;
};

template <class T>
void define_pairs(Table& table, const std::string& type) {
    using P = Pair<T>;
    using W = Wide<T>;
    for (const std::string rounding : {"", ".rn"}) {
        const std::string end = rounding + "." + type + "x2";
        define<P, P, P>(table, "add" + end, [](P a, P b) -> P { return {T(W(a.low) + W(b.low)), T(W(a.high) + W(b.high))}; });
        define<P, P, P>(table, "sub" + end, [](P a, P b) -> P { return {T(W(a.low) - W(b.low)), T(W(a.high) - W(b.high))}; });
        define<P, P, P>(table, "mul" + end, [](P a, P b) -> P { return {T(W(a.low) * W(b.low)), T(W(a.high) * W(b.high))}; });
    }
}

template <class T>
void define_roots(Table& table, const std::string& type) {
    define<T, T, T>(table, "div.rn." + type, [](T a, T b) { return a / b; });
    define<T, T>(table, "rcp.rn." + type, [](T a) { return T(1) / a; });
    define<T, T>(table, "sqrt.rn." + type, [](T a) { return std::sqrt(a); });
    define<T, T, T>(table, "copysign." + type, [](T sign, T size) { return std::copysign(size, sign); });
}

// What a GPU approximates is computed as exactly as C++ does: its last bits differ from a GPU's.
inline void define_approximations(Table& table) {
    for (const char* name : {"div.full.f32", "div.approx.f32"})
        define<float, float, float>(table, name, [](float a, float b) { return a / b; });
    define<float, float>(table, "rcp.approx.f32", [](float a) { return 1 / a; });
    define<float, float>(table, "sqrt.approx.f32", [](float a) { return std::sqrt(a); });
    define<float, float>(table, "rsqrt.approx.f32", [](float a) { return 1 / std::sqrt(a); });
    define<float, float>(table, "ex2.approx.f32", [](float a) { return std::exp2(a); });
    define<float, float>(table, "lg2.approx.f32", [](float a) { return std::log2(a); });
    define<float, float>(table, "sin.approx.f32", [](float a) { return std::sin(a); });
    define<float, float>(table, "cos.approx.f32", [](float a) { return std::cos(a); });
    define<float, float>(table, "tanh.approx.f32", [](float a) { return std::tanh(a); });
}

// The forms of float32 that flush subnormal values to zero.
inline void define_flushing(Table& table) {
    for (const char* rounding : {"", ".rn"}) {
        define<float, float, float>(table, std::string("add") + rounding + ".ftz.f32", [](float a, float b) {
            return flushed(flushed(a) + flushed(b));
        });
        define<float, float, float>(table, std::string("sub") + rounding + ".ftz.f32", [](float a, float b) {
            return flushed(flushed(a) - flushed(b));
        });
        define<float, float, float>(table, std::string("mul") + rounding + ".ftz.f32", [](float a, float b) {
            return flushed(flushed(a) * flushed(b));
        });
    }
    define<float, float, float, float>(table, "fma.rn.ftz.f32", [](float a, float b, float c) {
        return flushed(std::fma(flushed(a), flushed(b), flushed(c)));
    });
    define<float, float>(table, "ex2.approx.ftz.f32", [](float a) { return flushed(std::exp2(flushed(a))); });
    define<float, float>(table, "lg2.approx.ftz.f32", [](float a) { return std::log2(flushed(a)); });
    define<float, float>(table, "rcp.approx.ftz.f32", [](float a) { return flushed(1 / flushed(a)); });
    define<float, float>(table, "rsqrt.approx.ftz.f32", [](float a) { return 1 / std::sqrt(flushed(a)); });
    define<float, float>(table, "sqrt.approx.ftz.f32", [](float a) { return std::sqrt(flushed(a)); });
    define<float, float>(table, "abs.ftz.f32", [](float a) { return std::fabs(flushed(a)); });
    define<float, float>(table, "neg.ftz.f32", [](float a) { return -flushed(a); });
}

// A product, or its upper half, and a sum whose carry is kept, or which adds the carry kept before.
template <bool upper, bool adds_carry, bool keeps_carry>
void multiply_with_carry(Warp& warp, const Instruction& instruction, Mask mask) {
    for (Mask rest = mask; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        const uint64_t product = warp.read(instruction.inputs[0], lane) * warp.read(instruction.inputs[1], lane);
        const uint64_t part = upper ? product >> 32 : product & 0xffffffffu;
        const uint64_t sum = part + warp.read(instruction.inputs[2], lane) + (adds_carry ? warp.carry >> lane & 1 : 0);
        if (keeps_carry) warp.carry = (warp.carry & ~(Mask{1} << lane)) | Mask(sum >> 32) << lane;
        warp.write(instruction.outputs[0], lane, sum & 0xffffffffu);
    }
}

template <bool upper>
void define_carries(Table& table, const std::string& part) {
    enter(table, "mad." + part + ".cc.u32", &multiply_with_carry<upper, false, true>, {4}, {4, 4, 4});
    enter(table, "madc." + part + ".cc.u32", &multiply_with_carry<upper, true, true>, {4}, {4, 4, 4});
    enter(table, "madc." + part + ".u32", &multiply_with_carry<upper, true, false>, {4}, {4, 4, 4});
}

inline void define_arithmetic(Table& table) {
    define_carries<false>(table, "lo");
    define_carries<true>(table, "hi");
    define_integer<int16_t>(table, "s16");
    define_integer<uint16_t>(table, "u16");
    define_integer<int32_t>(table, "s32");
    define_integer<uint32_t>(table, "u32");
    define_integer<int64_t>(table, "s64");
    define_integer<uint64_t>(table, "u64");
    define_widening<int16_t>(table, "s16");
    define_widening<uint16_t>(table, "u16");
    define_widening<int32_t>(table, "s32");
    define_widening<uint32_t>(table, "u32");
    for (const char* kind : {"b", "u", "s"}) {
        define_bits<uint16_t>(table, kind + std::string("16"));
        define_bits<uint32_t>(table, kind + std::string("32"));
        define_bits<uint64_t>(table, kind + std::string("64"));
    }
    define_bits<Predicate>(table, "pred");
    define<Predicate, Predicate>(table, "not.pred", [](Predicate a) { return Predicate(!(a & 1)); });
    define_float<float>(table, "f32");
    define_float<double>(table, "f64");
    define_float<Half>(table, "f16");
    define_float<BFloat16>(table, "bf16");
    define_pairs<Half>(table, "f16");
    define_pairs<BFloat16>(table, "bf16");
    define_roots<float>(table, "f32");
    define_roots<double>(table, "f64");
    define_approximations(table);
    define_flushing(table);
}

}  // namespace emulator
