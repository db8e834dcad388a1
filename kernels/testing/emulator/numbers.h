// The number types of PTX that C++ lacks, and what PTX asks of the others.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace emulator {

using Half = _Float16;

// A bfloat16; sums and products are computed in float and rounded to the nearest even.
struct BFloat16 {
    uint16_t bits = 0;

    BFloat16() = default;
    explicit BFloat16(float value) {
        uint32_t word;
        std::memcpy(&word, &value, 4);
        bool is_nan = (word & 0x7fffffffu) > 0x7f800000u;
        bits = is_nan ? 0x7fff : static_cast<uint16_t>((word + 0x7fffu + (word >> 16 & 1)) >> 16);
    }
    // By way of a float whose last bit keeps whether something was cut off: so it is rounded only once.
    explicit BFloat16(double value) : BFloat16(odd_float(value)) {}
    operator float() const {
        uint32_t word = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    }

private:
    static float odd_float(double value) {
        float nearest = static_cast<float>(value);
        if (nearest == value || value != value) return nearest;
        uint32_t word;
        std::memcpy(&word, &nearest, 4);
        if (std::fabs(nearest) > std::fabs(value)) --word;
        word |= 1;
        std::memcpy(&nearest, &word, 4);
        return nearest;
    }
};

// A sum with its last bit set where something was cut off, so that it can be rounded to a narrower type.
inline double odd_sum(double a, double b) {
    const double sum = a + b;
    if (!std::isfinite(sum)) return sum;
    const double of_b = sum - a, lost = (a - (sum - of_b)) + (b - of_b);
    if (lost == 0) return sum;
    uint64_t word;
    std::memcpy(&word, &sum, 8);
    if (!(word & 1)) word += (lost > 0) == (sum > 0) ? 1 : -1;
    double odd;
    std::memcpy(&odd, &word, 8);
    return odd;
}

template <class T>
constexpr bool is_floating = std::is_floating_point_v<T> || std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>;

// What arithmetic is done in: narrow types in float, whose rounding to the narrow type afterwards is exact.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

// The type of the .ftz forms: subnormal values count as zero of their sign.
inline float flushed(float value) {
    return std::fabs(value) < std::numeric_limits<float>::min() ? std::copysign(0.0f, value) : value;
}

// max and min: a NaN gives way to a number, and -0 is below +0.
template <class T>
T largest(T a, T b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? b : a;
    return a > b ? a : b;
}

template <class T>
T smallest(T a, T b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? a : b;
    return a < b ? a : b;
}

// A float to an integer: rounded already; out of range it saturates, and a NaN becomes 0.
template <class To, class From>
To saturated(From value) {
    if (value != value) return 0;
    constexpr auto lowest = std::numeric_limits<To>::min(), highest = std::numeric_limits<To>::max();
    if (value <= static_cast<From>(lowest)) return lowest;
    if (value >= static_cast<From>(highest)) return highest;
    return static_cast<To>(value);
}

}  // namespace emulator
