// Reads a program as ptx.py writes it: one instruction per line,
//
//     name guard outputs... < inputs...
//
// where a guard is "-", a register ("7") or its negation ("!7"), and an operand is a register ("7"), nothing ("_"), the
// bits of a constant ("#3f800000"), the offset of the address before it ("@-16"), or the target of a branch (">12").
// "=12" tells that a store of the source became several instructions, of which number 12 is the first, and "~" that an
// operation is atomic only within its program.
#pragma once

#include <optional>
#include <sstream>
#include <stdexcept>

#include "exchanges.h"

namespace emulator {

// An instruction that the machine has not, or not with these operands.
struct Unsupported {
    uint32_t position;
};

inline const Table& instruction_table() {
    static const Table table = [] {
        Table table;
        define_arithmetic(table);
        define_conversions(table);
        define_memory(table);
        define_exchanges(table);
        table["bra"] = {nullptr, Kind::Branch, {}, {}, false, 0, nullptr};
        table["ret"] = {nullptr, Kind::Return, {}, {}, false, 0, nullptr};
        table["bar.sync"] = {nullptr, Kind::Barrier, {}, {}, false, 0, nullptr};
        enter(table, "nop", [](Warp&, const Instruction&, Mask) {}, {}, {});
        return table;
    }();
    return table;
}

class Loader {
public:
    Loader(const std::string& widths, uint32_t shared_bytes, uint32_t local_bytes, uint32_t warps) {
        program_.shared_bytes = shared_bytes;
        program_.local_bytes = local_bytes;
        program_.warps = warps;
        std::istringstream stream(widths);
        for (uint32_t width; stream >> width;) program_.registers.push_back(program_.reserve(width));
    }

    Program read(const std::string& text) {
        std::istringstream stream(text);
        for (std::string line; std::getline(stream, line);) program_.instructions.push_back(instruction(line));
        return std::move(program_);
    }

private:
    Instruction instruction(const std::string& line) {
        Instruction result;
        result.position = program_.instructions.size();
        std::istringstream words(line);
        std::string name, guard, word;
        words >> name >> guard;
        const auto found = instruction_table().find(name);
        if (found == instruction_table().end()) throw Unsupported{result.position};
        const Entry& entry = found->second;
        result.kind = entry.kind;
        result.detail = entry.detail;
        if (guard != "-") {
            result.guarded = true;
            result.guard_negated = guard[0] == '!';
            result.guard = program_.registers.at(std::stoul(guard.substr(result.guard_negated)));
        }
        while (words >> word && word != "<") add(result.outputs, result.output_count, entry.outputs, entry, word, result);
        while (words >> word) {
            if (word[0] == '@') result.offset = std::stoll(word.substr(1));
            else if (word[0] == '=') result.store = std::stoul(word.substr(1));
            else if (word[0] == '~') result.of_program = true;
            else if (word[0] == '>') result.target = std::stoul(word.substr(1));
            else add(result.inputs, result.input_count, entry.inputs, entry, word, result);
        }
        const bool complete = result.output_count == int(entry.outputs.size()) && result.input_count == int(entry.inputs.size());
        if (!complete) throw Unsupported{result.position};
        result.run = entry.exact && exact(result, entry) ? entry.exact : entry.run;
        return result;
    }

    static bool exact(const Instruction& instruction, const Entry& entry) {
        for (int k = 0; k < instruction.output_count; ++k)
            if (instruction.outputs[k].width != entry.outputs[k]) return false;
        for (int k = 0; k < instruction.input_count; ++k)
            if (instruction.inputs[k].width != entry.inputs[k]) return false;
        return true;
    }

    void add(std::array<Operand, MOST_OPERANDS>& operands, int& count, const std::vector<uint32_t>& widths,
             const Entry& entry, const std::string& word, const Instruction& instruction) {
        if (count >= int(widths.size()) || count >= MOST_OPERANDS) throw Unsupported{instruction.position};
        const Operand operand = this->operand(word, widths[count]);
        const bool fits = operand.width == widths[count] || operand.width == 0 ||
                          (entry.takes_wider_registers && operand.width > widths[count]);
        if (!fits) throw Unsupported{instruction.position};
        operands[count++] = operand;
    }

    Operand operand(const std::string& word, uint32_t width) {
        if (word == "_") return {};
        if (word[0] != '#') return program_.registers.at(std::stoul(word));
        const uint64_t bits = std::stoull(word.substr(1), nullptr, 16);
        const auto key = std::make_pair(bits, width);
        auto known = constants_.find(key);
        if (known == constants_.end()) {
            known = constants_.emplace(key, program_.reserve(width)).first;
            program_.constants.push_back({known->second, bits});
        }
        return known->second;
    }

    Program program_;
    std::map<std::pair<uint64_t, uint32_t>, Operand> constants_;
};

}  // namespace emulator
