// Loads, stores and atomic operations.
#pragma once

#include <algorithm>

#include "conversions.h"
#include "memory.h"

namespace emulator {

struct Global {
    static constexpr const char* name = "global";
    static constexpr Fault overlap = Fault::RaceBetweenThreads;
    static std::pair<int32_t, int64_t> owner(const Memory& memory, uint64_t address) { return memory.owner(address); }
    static uint8_t* at(Memory& memory, uint64_t address, const Request& request) {
        return memory.global(address, request);
    }
};

struct Shared {
    static constexpr const char* name = "shared";
    static constexpr Fault overlap = Fault::SharedRace;
    static std::pair<int32_t, int64_t> owner(const Memory&, uint64_t address) {
        return {NOBODY, static_cast<int64_t>(address)};
    }
    static uint8_t* at(Memory& memory, uint64_t address, const Request& request) {
        return memory.shared(address, request);
    }
};

// What does not fit into registers, each thread's own.
struct Local {
    static constexpr const char* name = "local";
    static uint8_t* at(Memory& memory, uint64_t address, const Request& request) {
        return memory.local(address, request);
    }
};

inline uint64_t address_of(const Warp& warp, const Instruction& instruction, int lane) {
    const uint64_t address = warp.read(instruction.inputs[0], lane) + instruction.offset;
    return instruction.inputs[0].width == 4 ? static_cast<uint32_t>(address) : address;
}

template <class Space, class T>
void load(Warp& warp, const Instruction& instruction, Mask mask) {
    const uint32_t count = instruction.output_count;
    for_each_lane(mask, [&](int lane) {
        const Request request{instruction, warp.thread(lane), sizeof(T), uint32_t(count * sizeof(T)), Access::Read};
        const uint8_t* place = Space::at(warp.memory, address_of(warp, instruction, lane), request);
        for (uint32_t k = 0; k < count; ++k) {
            T value;
            if (place) std::memcpy(&value, place + k * sizeof(T), sizeof(T));
            else std::memset(&value, POISON, sizeof(T));
            if (instruction.outputs[k].width) warp.write(instruction.outputs[k], lane, bits_of<T>(value));
        }
    });
}

// Reports lanes of one store that write different values to one place: which of them stays is not defined.
template <class Space, class T>
void check_overlap(Warp& warp, const Instruction& instruction, Mask mask) {
    const uint32_t count = instruction.input_count - 1, bytes = count * sizeof(T);
    std::array<std::pair<uint64_t, int>, LANES> targets;  // address and lane
    int number = 0;
    bool ascending = true;
    for_each_lane(mask, [&](int lane) {
        targets[number] = {address_of(warp, instruction, lane), lane};
        ascending &= number == 0 || targets[number].first >= targets[number - 1].first + bytes;
        ++number;
    });
    if (ascending) return;
    std::sort(targets.begin(), targets.begin() + number);
    for (int k = 1; k < number; ++k) {
        const auto [first, one] = targets[k - 1];
        const auto [second, other] = targets[k];
        if (second >= first + bytes) continue;
        bool equal = second == first;
        for (uint32_t part = 1; part <= count && equal; ++part)
            equal = value_of<T>(warp.read(instruction.inputs[part], one)) ==
                    value_of<T>(warp.read(instruction.inputs[part], other));
        if (equal) continue;
        const auto [owner, offset] = Space::owner(warp.memory, second);
        const Conflict conflict{true, false, int32_t(warp.memory.clock.program), Warps{1} << warp.index,
                                instruction.position};
        warp.memory.report(Space::overlap, {instruction, warp.thread(other), sizeof(T), bytes, Access::Write}, owner,
                           offset, conflict);
    }
}

template <class Space, class T>
void store(Warp& warp, const Instruction& instruction, Mask mask) {
    const uint32_t count = instruction.input_count - 1;
    if constexpr (!std::is_same_v<Space, Local>) check_overlap<Space, T>(warp, instruction, mask);
    for_each_lane(mask, [&](int lane) {
        std::array<T, MOST_OPERANDS> values;
        for (uint32_t k = 0; k < count; ++k) values[k] = value_of<T>(warp.read(instruction.inputs[1 + k], lane));
        const Request request{instruction,   warp.thread(lane), sizeof(T), uint32_t(count * sizeof(T)),
                              Access::Write, values.data()};
        uint8_t* place = Space::at(warp.memory, address_of(warp, instruction, lane), request);
        if (place) std::memcpy(place, values.data(), count * sizeof(T));
    });
}

// Replaces a value by a function of it and of the operand; `atom` also returns what was there.
template <class Function, class Space, class T, class... Operands, size_t... K>
void update(Warp& warp, const Instruction& instruction, Mask mask, std::index_sequence<K...>) {
    for_each_lane(mask, [&](int lane) {
        const Request request{instruction, warp.thread(lane), sizeof(T), sizeof(T),
                              instruction.of_program ? Access::AtomicOfProgram : Access::Atomic};
        uint8_t* place = Space::at(warp.memory, address_of(warp, instruction, lane), request);
        if (!place) return;
        T former;
        std::memcpy(&former, place, sizeof former);
        T latter = Function{}(former, value_of<Operands>(warp.read(instruction.inputs[1 + K], lane))...);
        std::memcpy(place, &latter, sizeof latter);
        if (instruction.output_count && instruction.outputs[0].width)
            warp.write(instruction.outputs[0], lane, bits_of<T>(former));
    });
}

template <class Function, class Space, class T, class... Operands>
void atomic(Warp& warp, const Instruction& instruction, Mask mask) {
    update<Function, Space, T, Operands...>(warp, instruction, mask, std::index_sequence_for<Operands...>{});
}

template <class Space, class T, class... Operands, class Function>
void define_atomic(Table& table, const std::string& operation, Function) {
    const std::string name = std::string(Space::name) + "." + operation;
    const Handler run = &atomic<Function, Space, T, Operands...>;
    enter(table, "atom." + name, run, {sizeof(T)}, {4, sizeof(Operands)...}, true);
    enter(table, "red." + name, run, {}, {4, sizeof(Operands)...}, true);
}

template <class Space, class T>
void define_atomic_sum(Table& table, const std::string& type) {
    using W = std::conditional_t<is_floating<T>, Wide<T>, uint64_t>;
    define_atomic<Space, T, T>(table, "add." + type, [](T a, T b) { return T(W(a) + W(b)); });
}

template <class Space, class T>
void define_atomic_order(Table& table, const std::string& type) {
    define_atomic<Space, T, T>(table, "min." + type, [](T a, T b) { return a < b ? a : b; });
    define_atomic<Space, T, T>(table, "max." + type, [](T a, T b) { return a > b ? a : b; });
}

template <class Space, class T>
void define_atomic_bits(Table& table, const std::string& type) {
    define_atomic<Space, T, T>(table, "and." + type, [](T a, T b) { return a & b; });
    define_atomic<Space, T, T>(table, "or." + type, [](T a, T b) { return a | b; });
    define_atomic<Space, T, T>(table, "xor." + type, [](T a, T b) { return a ^ b; });
    define_atomic<Space, T, T>(table, "exch." + type, [](T, T b) { return b; });
    define_atomic<Space, T, T, T>(table, "cas." + type, [](T a, T expected, T b) { return a == expected ? b : a; });
}

template <class Space>
void define_atomics(Table& table) {
    define_atomic_sum<Space, uint32_t>(table, "u32");
    define_atomic_sum<Space, uint32_t>(table, "s32");
    define_atomic_sum<Space, uint64_t>(table, "u64");
    define_atomic_sum<Space, uint64_t>(table, "s64");
    define_atomic_sum<Space, float>(table, "f32");
    define_atomic_sum<Space, double>(table, "f64");
    define_atomic_sum<Space, Half>(table, "f16");
    define_atomic_sum<Space, BFloat16>(table, "bf16");
    define_atomic_order<Space, uint32_t>(table, "u32");
    define_atomic_order<Space, int32_t>(table, "s32");
    define_atomic_order<Space, uint64_t>(table, "u64");
    define_atomic_order<Space, int64_t>(table, "s64");
    define_atomic_bits<Space, uint32_t>(table, "b32");
    define_atomic_bits<Space, uint64_t>(table, "b64");
}

template <class Space, class T>
void define_transfers(Table& table, const std::string& type) {
    for (uint32_t count : {1u, 2u, 4u, 8u}) {
        const std::string vector = count == 1 ? "." : ".v" + std::to_string(count) + ".";
        const std::string name = std::string(Space::name) + vector + type;
        std::vector<uint32_t> elements(count, sizeof(T)), operands(count + 1, sizeof(T));
        operands[0] = 4;  // an address in shared memory; those in global memory are wider
        enter(table, "ld." + name, &load<Space, T>, elements, {4}, true);
        if (count < MOST_OPERANDS) enter(table, "st." + name, &store<Space, T>, {}, operands, true);
    }
}

template <class Space>
void define_space(Table& table) {
    for (const char* kind : {"b", "u"}) {
        define_transfers<Space, uint8_t>(table, kind + std::string("8"));
        define_transfers<Space, uint16_t>(table, kind + std::string("16"));
        define_transfers<Space, uint32_t>(table, kind + std::string("32"));
        define_transfers<Space, uint64_t>(table, kind + std::string("64"));
    }
    define_transfers<Space, int8_t>(table, "s8");
    define_transfers<Space, int16_t>(table, "s16");
    define_transfers<Space, int32_t>(table, "s32");
    define_transfers<Space, int64_t>(table, "s64");
    define_transfers<Space, uint32_t>(table, "f32");
    define_transfers<Space, uint64_t>(table, "f64");
}

// An address among a kernel's parameters is a place that the code names, or chooses of several.
template <class T>
void load_parameter(Warp& warp, const Instruction& instruction, Mask mask) {
    for (int k = 0; k < instruction.output_count; ++k) {
        for_each_lane(mask, [&](int lane) {
            const uint64_t place = warp.read(instruction.inputs[0], lane) + instruction.offset + k * sizeof(T);
            T value;
            std::memcpy(&value, warp.parameters + place, sizeof(T));
            warp.write(instruction.outputs[k], lane, bits_of<T>(value));
        });
    }
}

template <class T>
void define_parameter(Table& table, const std::string& type) {
    for (uint32_t count : {1u, 2u, 4u}) {
        const std::string vector = count == 1 ? "." : ".v" + std::to_string(count) + ".";
        const std::vector<uint32_t> elements(count, sizeof(T));
        enter(table, "ld.param" + vector + type, &load_parameter<T>, elements, {sizeof(uint64_t)}, true);
    }
}

inline void define_parameters(Table& table) {
    for (const char* kind : {"b", "u"}) {
        define_parameter<uint8_t>(table, kind + std::string("8"));
        define_parameter<uint16_t>(table, kind + std::string("16"));
        define_parameter<uint32_t>(table, kind + std::string("32"));
        define_parameter<uint64_t>(table, kind + std::string("64"));
    }
    define_parameter<int8_t>(table, "s8");
    define_parameter<int16_t>(table, "s16");
    define_parameter<int32_t>(table, "s32");
    define_parameter<int64_t>(table, "s64");
    define_parameter<uint32_t>(table, "f32");
    define_parameter<uint64_t>(table, "f64");
}

inline void define_memory(Table& table) {
    define_parameters(table);
    define_space<Global>(table);
    define_space<Shared>(table);
    define_space<Local>(table);
    define_atomics<Global>(table);
    define_atomics<Shared>(table);
}

}  // namespace emulator
