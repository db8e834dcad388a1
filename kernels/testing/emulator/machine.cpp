// Runs the programs of a launch, one after the other, and the warps of a program from barrier to barrier.
#include <utility>

#include "loader.h"

namespace emulator {

// What became of the programs that were to run: a launch is paused every so often, so that it can be interrupted.
enum class State : uint32_t { Ended, Paused, Endless };

class Machine {
public:
    // A program that runs more than `most_instructions`, counted by warps, is taken not to end.
    Machine(const Program& program, const uint8_t* parameters, const uint32_t* grid, bool checks_races,
            uint64_t most_instructions)
        : memory(program, checks_races), counts(program.instructions.size()), most_instructions_(most_instructions),
          program_(program), grid_{grid[0], grid[1], grid[2]} {
        for (uint32_t index = 0; index < program.warps; ++index) {
            warps_.emplace_back(program, memory, index);
            warps_.back().parameters = parameters;
            warps_.back().grid = grid_;
        }
    }

    // Runs one program of the grid, or goes on with the one that was paused; `order` lists its warps in the order in
    // which they run. Pauses after `instructions`, of which it takes off what it ran.
    State run(uint32_t number, const uint32_t* order, uint64_t& instructions) {
        if (!paused_) begin(number);
        const uint64_t before = executed_;
        pause_ = std::min(executed_ + instructions, most_instructions_);
        const bool ended = run_warps(number, order);
        instructions -= std::min(executed_ - before, instructions);
        paused_ = !ended && executed_ < most_instructions_;
        if (!paused_) memory.end_program(ended);
        return ended ? State::Ended : paused_ ? State::Paused : State::Endless;
    }

    Memory memory;
    std::vector<uint64_t> counts;  // of each instruction, how often warps ran it

private:
    void begin(uint32_t number) {
        memory.begin_program();
        executed_ = epoch_ = turn_ = 0;
        for (Warp& warp : warps_) {
            warp.block = {number % grid_[0], number / grid_[0] % grid_[1], number / grid_[0] / grid_[1]};
            warp.start();
        }
    }

    // Runs the warps in turn, from barrier to barrier; false if there was no time left for all.
    bool run_warps(uint32_t number, const uint32_t* order) {
        for (;; ++epoch_, turn_ = 0) {
            for (; turn_ < warps_.size(); ++turn_) {
                Warp& warp = warps_[order[turn_]];
                if (!std::exchange(paused_, false)) memory.clock.begin(number, epoch_, warp.index);
                if (!advance(warp)) return false;
            }
            if (!pass_barrier()) return true;
        }
    }

    // Runs a warp until all of its lanes ended or wait; false if there was no time left.
    bool advance(Warp& warp) {
        while (!warp.groups.empty()) {
            if (warp.groups.size() > 1) merge(warp);
            Group& group = warp.groups.front();
            const Instruction& instruction = program_.instructions[group.position];
            Mask mask = group.lanes;
            if (instruction.guarded) {
                const Mask holding = warp.holding(instruction.guard);
                mask &= instruction.guard_negated ? ~holding : holding;
            }
            ++executed_;
            ++counts[group.position];
            if (instruction.store == instruction.position) memory.clock.begin_store();
            if (instruction.kind == Kind::Compute) {
                if (mask) instruction.run(warp, instruction, mask);
                ++group.position;
            } else if (!leave(warp, group, instruction, mask)) {
                return false;
            }
        }
        return true;
    }

    // A branch, an end or a barrier for the lanes of a mask; the others of the group go on.
    bool leave(Warp& warp, Group& group, const Instruction& instruction, Mask mask) {
        const Mask others = group.lanes & ~mask;
        const uint32_t position = group.position;
        if (others) group = {position + 1, others};
        else warp.groups.erase(warp.groups.begin());
        if (instruction.kind == Kind::Branch && mask) warp.groups.push_back({instruction.target, mask});
        if (instruction.kind == Kind::Barrier && mask) {
            if (warp.waiting && warp.barrier != position) diverged(warp, instruction, &warp);
            warp.waiting |= mask;
            warp.barrier = position;
        }
        if (executed_ >= most_instructions_)
            memory.report(Fault::Endless, {instruction, warp.thread(0), 0, 0, Access::Read}, NOBODY, 0);
        return executed_ < pause_;
    }

    // Puts the group of the lowest position first, joined with others that stand there.
    static void merge(Warp& warp) {
        std::sort(warp.groups.begin(), warp.groups.end(),
                  [](const Group& a, const Group& b) { return a.position < b.position; });
        size_t kept = 0;
        for (size_t k = 1; k < warp.groups.size(); ++k) {
            if (warp.groups[k].position == warp.groups[kept].position) warp.groups[kept].lanes |= warp.groups[k].lanes;
            else warp.groups[++kept] = warp.groups[k];
        }
        warp.groups.resize(kept + 1);
    }

    // Lets all go on that wait; false if nobody does, so that the program has ended.
    bool pass_barrier() {
        const Warp* first = nullptr;
        for (Warp& warp : warps_) {
            if (!warp.waiting) continue;
            if (!first) first = &warp;
            else if (warp.barrier != first->barrier) diverged(warp, program_.instructions[warp.barrier], first);
        }
        const auto waits = [](const Warp& warp) { return warp.waiting == ALL_LANES; };
        if (first && !std::all_of(warps_.begin(), warps_.end(), waits))
            diverged(*first, program_.instructions[first->barrier], nullptr);
        for (Warp& warp : warps_)
            if (warp.waiting) warp.groups.assign(1, Group{warp.barrier + 1, std::exchange(warp.waiting, 0)});
        return first != nullptr;
    }

    // Others wait at another barrier, or, without any, have ended.
    void diverged(const Warp& warp, const Instruction& instruction, const Warp* others) {
        const Request request{instruction, warp.thread(0), 0, 0, Access::Read};
        const Conflict other{others != nullptr, false, NOBODY, 0, others ? others->barrier : 0};
        memory.report(Fault::DivergentBarrier, request, NOBODY, 0, other);
    }

    const uint64_t most_instructions_;
    const Program& program_;
    std::array<uint32_t, 3> grid_;
    std::vector<Warp> warps_;
    uint64_t executed_ = 0;  // by the program that runs
    uint64_t pause_ = 0;     // where it pauses
    uint32_t epoch_ = 0;
    size_t turn_ = 0;        // of the warps
    bool paused_ = false;
};

}  // namespace emulator

// What machine.py calls.
extern "C" {

// Returns a program, or null and the position of the first instruction that the machine has not.
void* program_new(const char* text, const char* widths, uint32_t shared_bytes, uint32_t local_bytes, const uint8_t* tables,
                  uint32_t table_bytes, uint32_t warps, uint32_t* unsupported) {
    try {
        auto program = std::make_unique<emulator::Program>(
            emulator::Loader(widths, shared_bytes, local_bytes, warps).read(text));
        program->tables.assign(tables, tables + table_bytes);
        return program.release();
    } catch (const emulator::Unsupported& refused) {
        *unsupported = refused.position;
        return nullptr;
    }
}

void* machine_new(const void* program, const uint8_t* parameters, const uint32_t* grid, bool checks_races,
                  uint64_t most_instructions) {
    return new emulator::Machine(*static_cast<const emulator::Program*>(program), parameters, grid, checks_races,
                                 most_instructions);
}

void machine_add_storage(void* machine, uint8_t* bytes, int64_t size, uint64_t address, uint8_t* written, uint32_t granule) {
    static_cast<emulator::Machine*>(machine)->memory.storages.push_back(
        {bytes, size, address, written, false, emulator::History(size, granule, true)});
}

// Runs the listed programs, each with its warps in the given order, for so many instructions; the first one may have
// been begun before. Returns how many ended, and whether the next one never will.
uint32_t machine_run(void* machine, const uint32_t* programs, uint32_t count, const uint32_t* warps,
                     uint64_t instructions, bool* endless) {
    *endless = false;
    for (uint32_t k = 0; k < count; ++k) {
        const emulator::State state = static_cast<emulator::Machine*>(machine)->run(programs[k], warps, instructions);
        *endless = state == emulator::State::Endless;
        if (state != emulator::State::Ended) return k;
        if (!instructions) return k + 1;
    }
    return count;
}

bool machine_stored(const void* machine, uint32_t storage) {
    return static_cast<const emulator::Machine*>(machine)->memory.storages[storage].stored;
}

uint32_t machine_findings(const void* machine, emulator::Finding* findings, uint32_t room) {
    const auto& found = static_cast<const emulator::Machine*>(machine)->memory.findings.found();
    std::copy_n(found.begin(), std::min<size_t>(room, found.size()), findings);
    return found.size();
}

// Writes how often warps ran each instruction of the kernel, in all programs so far.
void machine_counts(const void* machine, uint64_t* counts) {
    const auto& counted = static_cast<const emulator::Machine*>(machine)->counts;
    std::copy(counted.begin(), counted.end(), counts);
}

void machine_delete(void* machine) { delete static_cast<emulator::Machine*>(machine); }
void program_delete(void* program) { delete static_cast<emulator::Program*>(program); }
}
