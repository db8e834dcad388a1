// What the machine found: one record for each kind of fault at each instruction, with how often it was seen.
#pragma once

#include <map>
#include <vector>

#include "program.h"

namespace emulator {

// The order is that of `KINDS` in machine.py.
enum class Fault : int32_t {
    OutOfBounds,
    Misaligned,
    Uninitialised,
    RaceBetweenPrograms,
    RaceBetweenWarps,
    RaceBetweenThreads,
    SharedOutOfBounds,
    SharedMisaligned,
    SharedRace,
    DivergentBarrier,
    InactiveLane,
    Endless,
};

constexpr int32_t NOBODY = -1;

// Read by Python: keep it equal to `Record` in machine.py.
struct Finding {
    int32_t fault;
    int32_t is_store;
    uint32_t position;        // the instruction
    int32_t other_position;   // the other side of a race, or NOBODY
    uint32_t program;
    uint32_t thread;
    int32_t other_program;    // of a race; NOBODY where several are meant
    int32_t other_warp;
    int64_t offset;           // from the start of the storage or of shared memory, in bytes
    int32_t storage;          // number of the storage, NOBODY if the address belongs to none
    int32_t bytes;
    uint64_t count;
};

class Findings {
public:
    void add(Finding finding, uint64_t times = 1) {
        auto [place, is_new] = places_.try_emplace({finding.fault, finding.position}, found_.size());
        finding.count = 0;
        if (is_new) found_.push_back(finding);
        found_[place->second].count += times;
    }

    const std::vector<Finding>& found() const { return found_; }

private:
    std::vector<Finding> found_;
    std::map<std::pair<int32_t, uint32_t>, size_t> places_;
};

}  // namespace emulator
