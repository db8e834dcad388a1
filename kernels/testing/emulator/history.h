// Who touched which byte: races are accesses to one byte, one of them a store, that no barrier puts in an order.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "findings.h"

namespace emulator {

using Stamp = uint32_t;
constexpr Stamp NEVER = 0;
constexpr Stamp MANY_PROGRAMS = 1;

using Warps = uint32_t;  // one bit per warp of a program

// What a warp, or each of several, does between two barriers.
struct Segment {
    uint32_t program;
    uint32_t epoch;  // barriers passed
    Warps warps;
};

// Numbers the segments in the order in which the machine runs them, and knows which warps had an effect: a warp that
// never stores anything cannot change a result by what it reads, and Triton has spare warps read along.
class Clock {
public:
    Stamp now = NEVER;
    uint32_t program = 0;
    uint32_t epoch = 0;
    Warps warp = 1;

    void begin(uint32_t new_program, uint32_t new_epoch, int32_t new_warp) {
        if (new_program != program || new_epoch != epoch) joined_.clear();
        program = new_program, epoch = new_epoch, warp = Warps{1} << new_warp;
        now = add({program, epoch, warp});
    }

    // Begins a segment of its own for a store of several instructions.
    void begin_store() { now = add({program, epoch, warp}); }

    const Segment& segment(Stamp stamp) const { return segments_[stamp]; }

    // Stands for several warps of the current program since the last barrier.
    Stamp joined(Warps warps) {
        auto [known, is_new] = joined_.try_emplace(warps, NEVER);
        if (is_new) known->second = add({program, epoch, warps});
        return known->second;
    }

    // The current warp stores.
    void store() { storing_ |= warp; }

    // Returns which warps of the current program stored something so far, and begins to count anew.
    Warps end_program() {
        if (program >= stored_.size()) stored_.resize(program + 1);
        stored_[program] = storing_;
        return std::exchange(storing_, 0);
    }

    // Which warps stored something, of a program that ended.
    Warps stored(uint32_t ended) const { return stored_[ended]; }

private:
    Stamp add(const Segment& segment) {
        segments_.push_back(segment);
        return static_cast<Stamp>(segments_.size() - 1);
    }

    std::vector<Segment> segments_{{0, 0, 0}, {0, 0, 0}};  // NEVER and MANY_PROGRAMS
    std::map<Warps, Stamp> joined_;
    Warps storing_ = 0;
    std::vector<Warps> stored_;  // by program
};

enum class Access { Read, Write, AtomicOfProgram, Atomic };  // atomic within the program alone, or for all

constexpr bool is_atomic(Access access) { return access >= Access::AtomicOfProgram; }

// One lane's access to memory.
struct Request {
    const Instruction& instruction;
    uint32_t thread;
    uint32_t width;  // of an element, in bytes
    uint32_t bytes;  // of all elements
    Access access;
    const void* stored = nullptr;  // the bytes that a store writes
};

// The last accesses to one granule.
struct Cell {
    Stamp writer = NEVER;
    uint32_t writer_position = 0;
    Stamp reader = NEVER;
    uint32_t reader_position = 0;
    Access written_by = Access::Write;
};

// Who an access was in conflict with.
struct Conflict {
    bool found = false;
    bool between_programs = false;
    int32_t program = NOBODY;
    Warps warps = 0;  // of the other side
    uint32_t position = 0;
    bool by_writes = false;   // both sides wrote
    bool overwrites = false;  // both sides are of one store, which writes different values to one place
    Warps readers = 0;  // without an effect of one of these warps, there was no conflict; none where both sides wrote
};

// The cells of one memory, made when they are first touched. A cell stands for a granule of bytes: as many as every
// access so far took at least, aligned; a finer access splits all cells.
class History {
public:
    History(int64_t bytes, uint32_t granule, bool outlives_program)
        : granule_(granule), outlives_program_(outlives_program), pages_(bytes / granule / PAGE + 1) {}

    // Takes note of an access, before it is done to the bytes at a place.
    Conflict note(Clock& clock, int64_t offset, const Request& request, const uint8_t* place) {
        while ((offset | request.width) & (granule_ - 1)) refine();
        Conflict conflict;
        for (int64_t index = offset / granule_; index < (offset + request.bytes) / granule_; ++index) {
            Cell& cell = at(index);
            if (request.access == Access::Read && cell.reader == clock.now) continue;
            Conflict here = check(clock, cell, request.access);
            if (here.found && !conflict.found) conflict = here;
            if (!conflict.found && overwrites(clock, cell, request, place, index * granule_ - offset)) {
                conflict.found = conflict.overwrites = true;
                conflict.position = cell.writer_position;
            }
            record(clock, cell, request.access, request.instruction.position);
        }
        return conflict;
    }

private:
    static constexpr int64_t PAGE = 1024;  // cells
    using Page = std::array<Cell, PAGE>;

    Cell& at(int64_t index) {
        auto& page = pages_[index / PAGE];
        if (!page) page = std::make_unique<Page>();
        return (*page)[index % PAGE];
    }

    // Whether a stamp is of another segment that no barrier separates from the current one.
    Conflict against(const Clock& clock, Stamp stamp, uint32_t position) const {
        if (stamp == NEVER || stamp == clock.now) return {};
        const Segment& other = clock.segment(stamp);
        if (stamp == MANY_PROGRAMS) return {outlives_program_, true, NOBODY, 0, position};
        if (other.program != clock.program)
            return {outlives_program_, true, static_cast<int32_t>(other.program), other.warps, position};
        const Warps others = other.epoch == clock.epoch ? other.warps & ~clock.warp : 0;
        return {others != 0, false, static_cast<int32_t>(other.program), others, position};
    }

    // Whether an earlier instruction of the same store wrote another value to a cell, which lies some bytes further on.
    bool overwrites(const Clock& clock, const Cell& cell, const Request& request, const uint8_t* place,
                    int64_t further) const {
        return request.instruction.store && cell.writer == clock.now && cell.writer_position >= request.instruction.store &&
               cell.writer_position < request.instruction.position &&
               std::memcmp(place + further, static_cast<const uint8_t*>(request.stored) + further, granule_) != 0;
    }

    Conflict check(const Clock& clock, const Cell& cell, Access access) const {
        const bool for_all = access == Access::Atomic && cell.written_by == Access::Atomic;
        if (!for_all) {
            Conflict conflict = against(clock, cell.writer, cell.writer_position);
            conflict.by_writes = access != Access::Read;
            conflict.readers = access == Access::Read ? clock.warp : 0;
            const bool ordered = is_atomic(access) && is_atomic(cell.written_by) && !conflict.between_programs;
            if (conflict.found && !ordered) return conflict;
        }
        if (access == Access::Read || idle(clock, cell.reader)) return {};
        Conflict conflict = against(clock, cell.reader, cell.reader_position);
        if (!conflict.between_programs) conflict.readers = conflict.warps;
        return conflict;
    }

    // Whether a stamp is of warps of an ended program that never stored anything.
    static bool idle(const Clock& clock, Stamp stamp) {
        if (stamp == NEVER || stamp == MANY_PROGRAMS) return false;
        const Segment& segment = clock.segment(stamp);
        return segment.program != clock.program && !(segment.warps & clock.stored(segment.program));
    }

    void record(Clock& clock, Cell& cell, Access access, uint32_t position) const {
        if (access == Access::Read) {
            cell.reader = joined(clock, cell.reader);
            cell.reader_position = position;
        } else {
            const bool both_atomic = is_atomic(access) && is_atomic(cell.written_by);
            cell.writer = both_atomic ? joined(clock, cell.writer) : clock.now;
            cell.writer_position = position;
            cell.written_by = both_atomic ? std::min(access, cell.written_by) : access;
        }
    }

    // The stamp that stands for a former one and the current segment.
    Stamp joined(Clock& clock, Stamp former) const {
        if (former == NEVER || former == clock.now) return clock.now;
        if (former == MANY_PROGRAMS) return former;
        const Segment& other = clock.segment(former);
        if (other.program != clock.program)
            return outlives_program_ && !idle(clock, former) ? MANY_PROGRAMS : clock.now;
        if (other.epoch == clock.epoch && other.warps != clock.warp) return clock.joined(other.warps | clock.warp);
        return clock.now;
    }

    void refine() {
        std::vector<std::unique_ptr<Page>> coarse(2 * pages_.size());
        std::swap(coarse, pages_);
        for (size_t number = 0; number < coarse.size() / 2; ++number)
            for (int64_t k = 0; coarse[number] && k < PAGE; ++k)
                for (int64_t half = 0; half < 2; ++half) at(2 * (number * PAGE + k) + half) = (*coarse[number])[k];
        granule_ /= 2;
    }

    uint32_t granule_;
    bool outlives_program_;  // whether accesses of other programs to the same bytes count
    std::vector<std::unique_ptr<Page>> pages_;
};

}  // namespace emulator
