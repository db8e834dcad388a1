// A kernel as the machine holds it: instructions whose operands are places in the registers of a warp.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace emulator {

constexpr int LANES = 32;  // threads of a warp
constexpr int MOST_OPERANDS = 8;

using Mask = uint32_t;  // one bit per lane
constexpr Mask ALL_LANES = 0xffffffffu;

struct Warp;
struct Instruction;

// Computes an instruction for the lanes of the mask.
using Handler = void (*)(Warp&, const Instruction&, Mask);

enum class Kind { Compute, Branch, Return, Barrier };

// A register or a constant: the bytes of lane 0, followed by those of the other lanes.
struct Operand {
    uint32_t place = 0;
    uint32_t width = 0;  // bytes of a lane
};

struct Instruction {
    Handler run = nullptr;
    Kind kind = Kind::Compute;
    uint16_t detail = 0;  // what one handler for several instructions goes by
    bool guarded = false;
    bool guard_negated = false;
    Operand guard;
    uint32_t target = 0;  // of a branch
    int64_t offset = 0;   // of an address, in bytes
    uint32_t store = 0;   // the first of the instructions that one store of the source became; 0 for a single one
    bool of_program = false;  // of an atomic operation: atomic only within its program
    uint32_t position = 0;
    int output_count = 0;
    int input_count = 0;
    std::array<Operand, MOST_OPERANDS> outputs;
    std::array<Operand, MOST_OPERANDS> inputs;
};

// What the table knows of an instruction. Widths are in bytes; a memory instruction or conversion also takes wider
// registers, as PTX allows; all others must match.
struct Entry {
    Handler run = nullptr;
    Kind kind = Kind::Compute;
    std::vector<uint32_t> outputs;
    std::vector<uint32_t> inputs;
    bool takes_wider_registers = false;
    uint16_t detail = 0;
    Handler exact = nullptr;  // a faster one, for registers of just these widths
};

using Table = std::unordered_map<std::string, Entry>;

// Enters an instruction that computes; kept out of line, as it is called a thousand times.
[[gnu::noinline]] inline void enter(Table& table, const std::string& name, Handler run, std::vector<uint32_t> outputs,
                                    std::vector<uint32_t> inputs, bool takes_wider_registers = false) {
    table[name] = {run, Kind::Compute, std::move(outputs), std::move(inputs), takes_wider_registers, 0, nullptr};
}

struct Constant {
    Operand operand;
    uint64_t bits;
};

struct Program {
    std::vector<Instruction> instructions;
    std::vector<Operand> registers;
    std::vector<Constant> constants;
    uint32_t register_bytes = 0;  // of a warp
    uint32_t shared_bytes = 0;
    uint32_t local_bytes = 0;  // of a thread
    std::vector<uint8_t> tables;  // the constants in global memory
    uint32_t warps = 0;

    // Reserves the lanes of one register.
    Operand reserve(uint32_t width) {
        Operand operand{register_bytes, width};
        register_bytes += (width * LANES + 63) / 64 * 64;
        return operand;
    }
};

}  // namespace emulator
