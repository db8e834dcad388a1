// Who touched which byte: races are accesses to one byte, one of them a store, that no barrier puts in an order.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "findings.h"

namespace emulator {

using Stamp = uint32_t;
constexpr Stamp NEVER = 0;
constexpr Stamp MANY_PROGRAMS = 1;
constexpr int32_t MANY_WARPS = -1;

// What a warp does between two barriers.
struct Segment {
    uint32_t program;
    uint32_t epoch;  // barriers passed
    int32_t warp;
};

// Numbers the segments in the order in which the machine runs them.
class Clock {
public:
    Stamp now = NEVER;
    uint32_t program = 0;
    uint32_t epoch = 0;
    int32_t warp = 0;

    void begin(uint32_t new_program, uint32_t new_epoch, int32_t new_warp) {
        if (new_program != program || new_epoch != epoch) many_warps_ = NEVER;
        program = new_program, epoch = new_epoch, warp = new_warp;
        now = add({program, epoch, warp});
    }

    const Segment& segment(Stamp stamp) const { return segments_[stamp]; }

    // Stands for more than one warp of the current program since the last barrier.
    Stamp many_warps() {
        if (many_warps_ == NEVER) many_warps_ = add({program, epoch, MANY_WARPS});
        return many_warps_;
    }

private:
    Stamp add(const Segment& segment) {
        segments_.push_back(segment);
        return static_cast<Stamp>(segments_.size() - 1);
    }

    std::vector<Segment> segments_{{0, 0, 0}, {0, 0, MANY_WARPS}};  // NEVER and MANY_PROGRAMS
    Stamp many_warps_ = NEVER;
};

enum class Access { Read, Write, Atomic };

// The last accesses to one granule.
struct Cell {
    Stamp writer = NEVER;
    uint32_t writer_position = 0;
    Stamp reader = NEVER;
    uint32_t reader_position = 0;
    bool atomic = false;  // whether the writer was an atomic operation
};

// Who an access was in conflict with.
struct Conflict {
    bool found = false;
    bool between_programs = false;
    int32_t program = NOBODY;
    int32_t warp = NOBODY;
    uint32_t position = 0;
    bool by_writes = false;  // both sides wrote
};

// The cells of one memory, made when they are first touched. A cell stands for a granule of bytes: as many as every
// access so far took at least, aligned; a finer access splits all cells.
class History {
public:
    History(int64_t bytes, uint32_t granule, bool outlives_program)
        : granule_(granule), outlives_program_(outlives_program), pages_(bytes / granule / PAGE + 1) {}

    Conflict note(Clock& clock, int64_t offset, uint32_t width, uint32_t bytes, Access access, uint32_t position) {
        while ((offset | width) & (granule_ - 1)) refine();
        Conflict conflict;
        for (int64_t index = offset / granule_; index < (offset + bytes) / granule_; ++index) {
            Cell& cell = at(index);
            if (access == Access::Read && cell.reader == clock.now) continue;
            Conflict here = check(clock, cell, access);
            if (here.found && !conflict.found) conflict = here;
            record(clock, cell, access, position);
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
        if (stamp == MANY_PROGRAMS) return {outlives_program_, true, NOBODY, NOBODY, position};
        if (other.program != clock.program)
            return {outlives_program_, true, static_cast<int32_t>(other.program), other.warp, position};
        bool ordered = other.epoch != clock.epoch || other.warp == clock.warp;
        return {!ordered, false, static_cast<int32_t>(other.program), other.warp, position};
    }

    Conflict check(const Clock& clock, const Cell& cell, Access access) const {
        if (!(access == Access::Atomic && cell.atomic)) {
            Conflict conflict = against(clock, cell.writer, cell.writer_position);
            conflict.by_writes = access != Access::Read;
            if (conflict.found) return conflict;
        }
        return access == Access::Read ? Conflict{} : against(clock, cell.reader, cell.reader_position);
    }

    void record(Clock& clock, Cell& cell, Access access, uint32_t position) const {
        if (access == Access::Read) {
            cell.reader = joined(clock, cell.reader);
            cell.reader_position = position;
        } else {
            bool both_atomic = access == Access::Atomic && cell.atomic;
            cell.writer = both_atomic ? joined(clock, cell.writer) : clock.now;
            cell.writer_position = position;
            cell.atomic = access == Access::Atomic;
        }
    }

    // The stamp that stands for a former one and the current segment.
    Stamp joined(Clock& clock, Stamp former) const {
        if (former == NEVER || former == clock.now) return clock.now;
        if (former == MANY_PROGRAMS) return former;
        const Segment& other = clock.segment(former);
        if (other.program != clock.program) return outlives_program_ ? MANY_PROGRAMS : clock.now;
        if (other.epoch == clock.epoch && other.warp != clock.warp) return clock.many_warps();
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
