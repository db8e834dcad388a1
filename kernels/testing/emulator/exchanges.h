// Instructions that move data between registers and between the lanes of a warp, and matrices through shared memory.
#pragma once

#include "transfers.h"

namespace emulator {

// The sources, one after the other, as one register; the lowest bytes first.
inline void pack(Warp& warp, const Instruction& instruction, Mask mask) {
    const uint32_t part = instruction.outputs[0].width / instruction.input_count;
    for_each_lane(mask, [&](int lane) {
        uint64_t bits = 0;
        for (int k = 0; k < instruction.input_count; ++k) {
            uint64_t piece = warp.read(instruction.inputs[k], lane);
            std::memcpy(reinterpret_cast<uint8_t*>(&bits) + k * part, &piece, part);
        }
        warp.write(instruction.outputs[0], lane, bits);
    });
}

inline void unpack(Warp& warp, const Instruction& instruction, Mask mask) {
    const uint32_t part = instruction.inputs[0].width / instruction.output_count;
    for_each_lane(mask, [&](int lane) {
        const uint64_t bits = warp.read(instruction.inputs[0], lane);
        for (int k = 0; k < instruction.output_count; ++k) {
            uint64_t piece = 0;
            std::memcpy(&piece, reinterpret_cast<const uint8_t*>(&bits) + k * part, part);
            if (instruction.outputs[k].width) warp.write(instruction.outputs[k], lane, piece);
        }
    });
}

inline void define_packing(Table& table) {
    for (uint32_t width : {2u, 4u, 8u})
        for (uint32_t parts : {2u, 4u, 8u}) {
            if (parts > width) continue;
            const std::string name = std::to_string(parts) + ".b" + std::to_string(8 * width);
            const std::vector<uint32_t> pieces(parts, width / parts);
            enter(table, "pack." + name, &pack, {width}, pieces, true);
            enter(table, "unpack." + name, &unpack, pieces, {width}, true);
        }
}

// Takes the value of another lane; PTX's own names for what the operands hold.
template <class Source>
void shuffle(Warp& warp, const Instruction& instruction, Mask mask) {
    const Operand a = instruction.inputs[0], b = instruction.inputs[1], c = instruction.inputs[2];
    std::array<uint64_t, LANES> values;
    for (int lane = 0; lane < LANES; ++lane) values[lane] = warp.read(a, lane);
    for_each_lane(mask, [&](int lane) {
        const int shift = warp.read(b, lane) & 31, clamp = warp.read(c, lane) & 31;
        const int segment = warp.read(c, lane) >> 8 & 31;
        const int lowest = lane & segment, highest = lowest | (clamp & ~segment);
        bool inside;
        int source = Source{}(lane, shift, segment, lowest, highest, inside);
        if (!inside) source = lane;
        if (!(mask >> source & 1))
            warp.memory.report(Fault::InactiveLane, {instruction, warp.thread(lane), 4, 4, Access::Read}, NOBODY, source);
        warp.write(instruction.outputs[0], lane, values[source]);
        if (instruction.outputs[1].width) warp.write(instruction.outputs[1], lane, inside);
    });
}

template <class Source>
void define_shuffle(Table& table, const std::string& mode, Source) {
    enter(table, "shfl.sync." + mode + ".b32", &shuffle<Source>, {4, 1}, {4, 4, 4, 4});
}

inline void define_shuffles(Table& table) {
    define_shuffle(table, "up", [](int lane, int shift, int, int, int highest, bool& inside) {
        inside = lane - shift >= highest;
        return lane - shift;
    });
    define_shuffle(table, "down", [](int lane, int shift, int, int, int highest, bool& inside) {
        inside = lane + shift <= highest;
        return lane + shift;
    });
    define_shuffle(table, "bfly", [](int lane, int shift, int, int, int highest, bool& inside) {
        inside = (lane ^ shift) <= highest;
        return lane ^ shift;
    });
    define_shuffle(table, "idx", [](int, int shift, int segment, int lowest, int highest, bool& inside) {
        const int source = lowest | (shift & ~segment);
        inside = source <= highest;
        return source;
    });
}

// One value of all lanes, given to each of them.
template <class Function, class T>
void reduce(Warp& warp, const Instruction& instruction, Mask mask) {
    const T* values = warp.lanes<T>(instruction.inputs[0]);
    T result = values[__builtin_ctz(mask)];
    for_each_lane(mask & (mask - 1), [&](int lane) { result = Function{}(result, values[lane]); });
    for_each_lane(mask, [&](int lane) { warp.write(instruction.outputs[0], lane, bits_of<T>(result)); });
}

template <class T, class Function>
void define_reduction(Table& table, const std::string& name, Function) {
    enter(table, "redux.sync." + name, &reduce<Function, T>, {4}, {4, 4});
}

inline void ballot(Warp& warp, const Instruction& instruction, Mask mask) {
    const Mask votes = warp.holding(instruction.inputs[0]) & mask;
    for_each_lane(mask, [&](int lane) { warp.write(instruction.outputs[0], lane, votes); });
}

inline void define_reductions(Table& table) {
    for (const char* type : {"s32", "u32"})
        define_reduction<uint32_t>(table, std::string("add.") + type, [](uint32_t a, uint32_t b) { return a + b; });
    define_reduction<int32_t>(table, "min.s32", [](int32_t a, int32_t b) { return std::min(a, b); });
    define_reduction<int32_t>(table, "max.s32", [](int32_t a, int32_t b) { return std::max(a, b); });
    define_reduction<uint32_t>(table, "min.u32", [](uint32_t a, uint32_t b) { return std::min(a, b); });
    define_reduction<uint32_t>(table, "max.u32", [](uint32_t a, uint32_t b) { return std::max(a, b); });
    define_reduction<uint32_t>(table, "and.b32", [](uint32_t a, uint32_t b) { return a & b; });
    define_reduction<uint32_t>(table, "or.b32", [](uint32_t a, uint32_t b) { return a | b; });
    define_reduction<uint32_t>(table, "xor.b32", [](uint32_t a, uint32_t b) { return a ^ b; });
    enter(table, "vote.sync.ballot.b32", &ballot, {4}, {1, 4});
}

// Matrices of 8 by 8 elements of 2 bytes. Lanes 8k to 8k+7 hold the addresses of the rows of matrix k; every lane holds
// two neighbours of row lane / 4, or of that column where the matrix is transposed.
constexpr int ROWS = 8;
using Matrix = uint16_t[ROWS][ROWS];

template <bool transposed>
uint16_t& element(Matrix& matrix, int lane, int which) {
    const int row = lane / 4, column = lane % 4 * 2 + which;
    return transposed ? matrix[column][row] : matrix[row][column];
}

template <bool transposed>
void load_matrices(Warp& warp, const Instruction& instruction, Mask mask) {
    for (int k = 0; k < instruction.output_count; ++k) {
        Matrix matrix{};
        for (int row = 0; row < ROWS; ++row) {
            const int lane = ROWS * k + row;
            const Request request{instruction, warp.thread(lane), 2, sizeof matrix[row], Access::Read};
            const uint8_t* place = warp.memory.shared(address_of(warp, instruction, lane), request);
            if (place) std::memcpy(matrix[row], place, sizeof matrix[row]);
        }
        for_each_lane(mask, [&](int lane) {
            const uint32_t low = element<transposed>(matrix, lane, 0), high = element<transposed>(matrix, lane, 1);
            warp.write(instruction.outputs[k], lane, high << 16 | low);
        });
    }
}

template <bool transposed>
void store_matrices(Warp& warp, const Instruction& instruction, Mask mask) {
    for (int k = 0; k < instruction.input_count - 1; ++k) {
        Matrix matrix{};
        for_each_lane(mask, [&](int lane) {
            const uint64_t bits = warp.read(instruction.inputs[1 + k], lane);
            for (int which = 0; which < 2; ++which) element<transposed>(matrix, lane, which) = bits >> 16 * which;
        });
        for (int row = 0; row < ROWS; ++row) {
            const int lane = ROWS * k + row;
            const Request request{instruction, warp.thread(lane), 2, sizeof matrix[row], Access::Write, matrix[row]};
            uint8_t* place = warp.memory.shared(address_of(warp, instruction, lane), request);
            if (place) std::memcpy(place, matrix[row], sizeof matrix[row]);
        }
    }
}

inline void define_matrices(Table& table) {
    for (uint32_t count : {1u, 2u, 4u}) {
        const std::string shape = "trix.sync.aligned.m8n8.x" + std::to_string(count);
        const std::vector<uint32_t> pieces(count, 4);
        std::vector<uint32_t> operands(count + 1, 4);
        enter(table, "ldma" + shape + ".shared.b16", &load_matrices<false>, pieces, {4}, true);
        enter(table, "ldma" + shape + ".trans.shared.b16", &load_matrices<true>, pieces, {4}, true);
        enter(table, "stma" + shape + ".shared.b16", &store_matrices<false>, {}, operands, true);
        enter(table, "stma" + shape + ".trans.shared.b16", &store_matrices<true>, {}, operands, true);
    }
}

// Bytes and bits of a register of 32 bits.
inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (int k = 0; k < 4; ++k) {
        const uint32_t choice = selector >> 4 * k & 15;
        uint32_t byte = bytes >> 8 * (choice & 7) & 0xff;
        if (choice & 8) byte = byte & 0x80 ? 0xff : 0;  // its sign, repeated
        result |= byte << 8 * k;
    }
    return result;
}

template <class T>
T bit_field(T a, uint32_t start, uint32_t length) {
    constexpr uint32_t bits = 8 * sizeof(T);
    using U = std::make_unsigned_t<T>;
    start &= 0xff, length &= 0xff;
    if (length == 0) return 0;
    const uint32_t last = std::min(start + length - 1, bits - 1);
    const bool sign = std::is_signed_v<T> && (U(a) >> last & 1);
    const U field = start < bits ? U(a) >> start : U(0);
    const U mask = length >= bits ? ~U(0) : (U(1) << length) - 1;
    const U held = start > last ? U(0) : (last - start + 1 >= bits ? ~U(0) : (U(1) << (last - start + 1)) - 1);
    return T((field & held & mask) | (sign ? mask & ~held : U(0)) | (sign ? ~mask : U(0)));
}

// Any function of three bits; bit 4a + 2b + c of its truth table holds its value.
inline void any_logic(Warp& warp, const Instruction& instruction, Mask mask) {
    for_each_lane(mask, [&](int lane) {
        std::array<uint64_t, 4> in;
        for (int k = 0; k < 4; ++k) in[k] = warp.read(instruction.inputs[k], lane);
        uint64_t result = 0;
        for (int row = 0; row < 8; ++row)
            if (in[3] >> row & 1)
                result |= (row & 4 ? in[0] : ~in[0]) & (row & 2 ? in[1] : ~in[1]) & (row & 1 ? in[2] : ~in[2]);
        warp.write(instruction.outputs[0], lane, result);
    });
}

inline void define_bit_operations(Table& table) {
    using U = uint32_t;
    define<U, U, U, U>(table, "prmt.b32", [](U a, U b, U selector) { return permuted(a, b, selector); });
    define<U, U, U, U>(table, "bfe.u32", [](U a, U start, U length) { return bit_field<uint32_t>(a, start, length); });
    define<U, U, U, U>(table, "bfe.s32", [](U a, U start, U length) { return U(bit_field<int32_t>(a, start, length)); });
    define<U, U>(table, "popc.b32", [](U a) { return U(__builtin_popcount(a)); });
    define<U, uint64_t>(table, "popc.b64", [](uint64_t a) { return U(__builtin_popcountll(a)); });
    define<U, U>(table, "clz.b32", [](U a) { return U(a ? __builtin_clz(a) : 32); });
    define<U, uint64_t>(table, "clz.b64", [](uint64_t a) { return U(a ? __builtin_clzll(a) : 64); });
    define<U, U, U, U>(table, "shf.l.wrap.b32", [](U low, U high, U shift) {
        return U((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
    });
    define<U, U, U, U>(table, "shf.r.wrap.b32", [](U low, U high, U shift) {
        return U((uint64_t(high) << 32 | low) >> (shift & 31));
    });
    enter(table, "lop3.b32", &any_logic, {4}, {4, 4, 4, 4});
}

template <class Function>
void special(Warp& warp, const Instruction& instruction, Mask mask) {
    alignas(64) uint32_t values[LANES];
    for (int lane = 0; lane < LANES; ++lane) values[lane] = Function{}(warp, lane);
    warp.store(instruction.outputs[0], values, mask);
}

template <class Function>
void define_special(Table& table, const std::string& name, Function) {
    enter(table, "special." + name, &special<Function>, {4}, {});
}

inline void define_special_registers(Table& table) {
    define_special(table, "%tid.x", [](const Warp& warp, int lane) { return warp.thread(lane); });
    define_special(table, "%tid.y", [](const Warp&, int) { return 0u; });
    define_special(table, "%tid.z", [](const Warp&, int) { return 0u; });
    define_special(table, "%ntid.x", [](const Warp& warp, int) { return warp.threads; });
    define_special(table, "%laneid", [](const Warp&, int lane) { return uint32_t(lane); });
    define_special(table, "%ctaid.x", [](const Warp& warp, int) { return warp.block[0]; });
    define_special(table, "%ctaid.y", [](const Warp& warp, int) { return warp.block[1]; });
    define_special(table, "%ctaid.z", [](const Warp& warp, int) { return warp.block[2]; });
    define_special(table, "%nctaid.x", [](const Warp& warp, int) { return warp.grid[0]; });
    define_special(table, "%nctaid.y", [](const Warp& warp, int) { return warp.grid[1]; });
    define_special(table, "%nctaid.z", [](const Warp& warp, int) { return warp.grid[2]; });
}

inline void define_exchanges(Table& table) {
    define_packing(table);
    define_shuffles(table);
    define_reductions(table);
    define_matrices(table);
    define_bit_operations(table);
    define_special_registers(table);
}

}  // namespace emulator
