// cvt: from one number type to another. Its registers may be wider than its types.
#pragma once

#include "arithmetic.h"

namespace emulator {

template <class T>
T value_of(uint64_t bits) {
    T value;
    std::memcpy(static_cast<void*>(&value), &bits, sizeof value);
    return value;
}

// The bits that a register of 8 bytes takes: integers are extended by their sign, so that any width is right.
template <class T>
uint64_t bits_of(T value) {
    if constexpr (std::is_integral_v<T>) {
        return static_cast<uint64_t>(static_cast<int64_t>(value));
    } else {
        uint64_t bits = 0;
        std::memcpy(&bits, &value, sizeof value);
        return bits;
    }
}

// Conversions are many and most are rare, so one handler serves them all; the frequent ones have their own below.
enum class Type : uint16_t { S8, U8, S16, U16, S32, U32, S64, U64, F32, F64, F16, BF16 };
enum class Rounding : uint16_t { Nearest, Zero, Down, Up };

struct TypeName {
    Type type;
    const char* name;
    uint32_t bytes;
};

constexpr TypeName TYPES[] = {
    {Type::S8, "s8", 1},   {Type::U8, "u8", 1},   {Type::S16, "s16", 2}, {Type::U16, "u16", 2},
    {Type::S32, "s32", 4}, {Type::U32, "u32", 4}, {Type::S64, "s64", 8}, {Type::U64, "u64", 8},
    {Type::F32, "f32", 4}, {Type::F64, "f64", 8}, {Type::F16, "f16", 2}, {Type::BF16, "bf16", 2},
};

constexpr std::pair<Rounding, const char*> ROUNDINGS[] = {
    {Rounding::Nearest, ".rni"}, {Rounding::Zero, ".rzi"}, {Rounding::Down, ".rmi"}, {Rounding::Up, ".rpi"}};

constexpr bool is_float(Type type) { return type >= Type::F32; }

// An integer as its bits, extended by its sign to 64.
inline uint64_t integer_of(uint64_t bits, Type type) {
    switch (type) {
        case Type::S8: return bits_of(value_of<int8_t>(bits));
        case Type::U8: return value_of<uint8_t>(bits);
        case Type::S16: return bits_of(value_of<int16_t>(bits));
        case Type::U16: return value_of<uint16_t>(bits);
        case Type::S32: return bits_of(value_of<int32_t>(bits));
        case Type::U32: return value_of<uint32_t>(bits);
        default: return bits;
    }
}

inline double float_of(uint64_t bits, Type type) {
    switch (type) {
        case Type::F32: return value_of<float>(bits);
        case Type::F64: return value_of<double>(bits);
        case Type::F16: return static_cast<double>(value_of<Half>(bits));
        default: return float(value_of<BFloat16>(bits));
    }
}

inline uint64_t bits_of_float(double value, Type type) {
    switch (type) {
        case Type::F32: return bits_of(static_cast<float>(value));
        case Type::F64: return bits_of(value);
        case Type::F16: return bits_of(static_cast<Half>(value));
        default: return bits_of(BFloat16(value));
    }
}

inline double rounded(double value, Rounding rounding) {
    switch (rounding) {
        case Rounding::Zero: return std::trunc(value);
        case Rounding::Down: return std::floor(value);
        case Rounding::Up: return std::ceil(value);
        default: return std::nearbyint(value);
    }
}

inline uint64_t bits_of_saturated(double value, Type type) {
    switch (type) {
        case Type::S8: return bits_of(saturated<int8_t>(value));
        case Type::U8: return saturated<uint8_t>(value);
        case Type::S16: return bits_of(saturated<int16_t>(value));
        case Type::U16: return saturated<uint16_t>(value);
        case Type::S32: return bits_of(saturated<int32_t>(value));
        case Type::U32: return saturated<uint32_t>(value);
        case Type::S64: return bits_of(saturated<int64_t>(value));
        default: return saturated<uint64_t>(value);
    }
}

inline uint64_t converted(uint64_t bits, Type to, Type from, Rounding rounding) {
    if (!is_float(from)) {
        const uint64_t integer = integer_of(bits, from);
        if (!is_float(to)) return integer_of(integer, to);
        const bool is_negative = from != Type::U64 && static_cast<int64_t>(integer) < 0;
        // Straight to float32: by way of double, 64 bits would be rounded twice.
        if (to == Type::F32)
            return bits_of(is_negative ? static_cast<float>(static_cast<int64_t>(integer)) : static_cast<float>(integer));
        return bits_of_float(is_negative ? double(static_cast<int64_t>(integer)) : double(integer), to);
    }
    const double value = float_of(bits, from);
    if (is_float(to)) return bits_of_float(to == from ? rounded(value, rounding) : value, to);
    return bits_of_saturated(rounded(value, rounding), to);
}

// An instruction's detail holds its types and rounding.
constexpr uint16_t detail_of(Type to, Type from, Rounding rounding) {
    return static_cast<uint16_t>(static_cast<int>(to) << 8 | static_cast<int>(from) << 4 | static_cast<int>(rounding));
}

inline void convert(Warp& warp, const Instruction& instruction, Mask mask) {
    const auto to = static_cast<Type>(instruction.detail >> 8), from = static_cast<Type>(instruction.detail >> 4 & 15);
    const auto rounding = static_cast<Rounding>(instruction.detail & 15);
    for_each_lane(mask, [&](int lane) {
        const uint64_t bits = warp.read(instruction.inputs[0], lane);
        warp.write(instruction.outputs[0], lane, converted(bits, to, from, rounding));
    });
}

inline void define_conversion(Table& table, const std::string& rounding_name, const TypeName& to, const TypeName& from,
                              Rounding rounding) {
    const std::string name = "cvt" + rounding_name + "." + to.name + "." + from.name;
    table[name] = {&convert, Kind::Compute, {to.bytes}, {from.bytes}, true,
                   detail_of(to.type, from.type, rounding), nullptr};
}

inline void define_conversions_between(Table& table, const TypeName& to, const TypeName& from) {
    if (!is_float(from.type)) {
        define_conversion(table, is_float(to.type) ? ".rn" : "", to, from, Rounding::Nearest);
    } else if (!is_float(to.type) || to.type == from.type) {
        for (const auto& [rounding, name] : ROUNDINGS)
            for (const char* flush : {"", ".ftz"}) define_conversion(table, std::string(name) + flush, to, from, rounding);
    } else {
        define_conversion(table, to.bytes > from.bytes ? "" : ".rn", to, from, Rounding::Nearest);
    }
}

// Gives a frequent conversion a handler of its own, for registers as wide as its types.
template <class To, class From, class Function>
void define_fast(Table& table, const std::string& name, Function) {
    table.at(name).exact = &compute_1<Function, To, From>;
}

template <class T>
void define_narrow(Table& table, const std::string& type) {
    define_fast<float, T>(table, "cvt.f32." + type, [](T a) { return float(a); });
    define_fast<T, float>(table, "cvt.rn." + type + ".f32", [](float a) { return T(a); });
    define<uint32_t, float, float>(table, "cvt.rn." + type + "x2.f32", [](float high, float low) {
        return uint32_t(bits_as<uint16_t>(T(high))) << 16 | bits_as<uint16_t>(T(low));
    });
}

inline void define_conversions(Table& table) {
    for (const TypeName& to : TYPES)
        for (const TypeName& from : TYPES) define_conversions_between(table, to, from);
    define_narrow<Half>(table, "f16");
    define_narrow<BFloat16>(table, "bf16");
    define_fast<int64_t, int32_t>(table, "cvt.s64.s32", [](int32_t a) { return int64_t(a); });
    define_fast<uint64_t, uint32_t>(table, "cvt.u64.u32", [](uint32_t a) { return uint64_t(a); });
    define_fast<uint32_t, uint64_t>(table, "cvt.u32.u64", [](uint64_t a) { return uint32_t(a); });
    define_fast<float, int32_t>(table, "cvt.rn.f32.s32", [](int32_t a) { return float(a); });
    define_fast<int32_t, float>(table, "cvt.rzi.s32.f32", [](float a) { return saturated<int32_t>(std::trunc(a)); });
    define_fast<float, float>(table, "cvt.rmi.ftz.f32.f32", [](float a) { return std::floor(flushed(a)); });
}

}  // namespace emulator
