// A warp: the registers of its 32 threads, where each of them stands, and what its special registers hold.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>

#include "program.h"

namespace emulator {

class Memory;

// Lanes that stand at one instruction.
struct Group {
    uint32_t position;
    Mask lanes;
};

struct Warp {
    Memory& memory;
    uint32_t index;                // within its program
    std::array<uint32_t, 3> block{};  // which program of the grid this is
    std::array<uint32_t, 3> grid{};
    uint32_t threads = 0;          // of the program
    const uint8_t* parameters = nullptr;
    std::vector<Group> groups;     // by ascending position
    Mask carry = 0;                // of the last addition that says so
    Mask waiting = 0;              // lanes at a barrier
    uint32_t barrier = 0;          // the instruction at which they wait

    Warp(const Program& program, Memory& memory, uint32_t index) : memory(memory), index(index) {
        registers_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, program.register_bytes + 64)));
        std::memset(registers_.get(), 0, program.register_bytes);
        for (const Constant& constant : program.constants)
            for (int lane = 0; lane < LANES; ++lane) write(constant.operand, lane, constant.bits);
        threads = program.warps * LANES;
    }

    uint32_t thread(int lane) const { return index * LANES + lane; }

    void start() {
        groups.assign(1, {0, ALL_LANES});
        waiting = 0;
    }

    bool ended() const { return groups.empty() && waiting == 0; }

    template <class T>
    T* lanes(Operand operand) {
        return reinterpret_cast<T*>(__builtin_assume_aligned(registers_.get() + operand.place, 64));
    }

    // Stores a result in the lanes of the mask.
    template <class T>
    void store(Operand operand, const T* results, Mask mask) {
        T* destination = lanes<T>(operand);
        if (mask == ALL_LANES) {
            std::memcpy(destination, results, LANES * sizeof(T));
            return;
        }
        for (int lane = 0; lane < LANES; ++lane)
            destination[lane] = mask >> lane & 1 ? results[lane] : destination[lane];
    }

    // The bits of one lane, zero-extended.
    uint64_t read(Operand operand, int lane) const {
        const uint8_t* first = registers_.get() + operand.place;
        switch (operand.width) {
            case 8: return reinterpret_cast<const uint64_t*>(first)[lane];
            case 4: return reinterpret_cast<const uint32_t*>(first)[lane];
            case 2: return reinterpret_cast<const uint16_t*>(first)[lane];
            default: return first[lane];
        }
    }

    void write(Operand operand, int lane, uint64_t bits) {
        uint8_t* first = registers_.get() + operand.place;
        switch (operand.width) {
            case 8: reinterpret_cast<uint64_t*>(first)[lane] = bits; break;
            case 4: reinterpret_cast<uint32_t*>(first)[lane] = bits; break;
            case 2: reinterpret_cast<uint16_t*>(first)[lane] = bits; break;
            default: first[lane] = bits;
        }
    }

    // The lanes whose predicate holds.
    Mask holding(Operand predicate) const {
        Mask mask = 0;
        for (int part = 0; part < LANES / 8; ++part) {
            uint64_t flags;
            std::memcpy(&flags, registers_.get() + predicate.place + 8 * part, 8);
            mask |= static_cast<Mask>((flags & 0x0101010101010101u) * 0x0102040810204080u >> 56) << 8 * part;
        }
        return mask;
    }

private:
    struct Free {
        void operator()(uint8_t* bytes) const { std::free(bytes); }
    };
    std::unique_ptr<uint8_t, Free> registers_;
};

// Calls a function with each lane of a mask.
template <class Function>
void for_each_lane(Mask mask, Function function) {
    for (; mask; mask &= mask - 1) function(__builtin_ctz(mask));
}

}  // namespace emulator
