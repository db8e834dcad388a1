// Global and shared memory: every access is checked for its bounds, its alignment, unwritten bytes and races.
#pragma once

#include <cstring>
#include <map>
#include <tuple>
#include <vector>

#include "history.h"
#include "warp.h"

namespace emulator {

// Every storage has a range of addresses of its own, so wide that no wrong offset leads into another storage. Its
// first byte lies in the middle, so that addresses before it are its own, too. No address of the host is that high.
constexpr int RANGE_BITS = 44;
constexpr uint64_t FIRST_RANGE = uint64_t{1} << 12;
constexpr uint64_t TABLES = (FIRST_RANGE - 1) << RANGE_BITS;  // where the kernel's own constants lie
constexpr uint8_t POISON = 0xff;  // NaN in every float type

struct Storage {
    uint8_t* bytes;
    int64_t size;
    uint64_t address;  // of its first byte, as kernels see it
    uint8_t* written;  // one flag per byte; null where all bytes count as written
    bool stored = false;
    History history;
};

class Memory {
public:
    Clock clock;
    Findings findings;
    std::vector<Storage> storages;

    Memory(const Program& program, bool checks_races)
        : shared_(program.shared_bytes),
          local_(size_t{program.local_bytes} * program.warps * LANES),
          local_bytes_(program.local_bytes),
          tables_(program.tables),
          shared_history_(program.shared_bytes, 4, false),
          checks_races_(checks_races) {}

    void begin_program() {
        std::fill(shared_.begin(), shared_.end(), POISON);
        std::fill(local_.begin(), local_.end(), POISON);
    }

    // Reports the races of the program in which a warp read that had an effect: of all that read, if it did not end.
    void end_program(bool ended) {
        const Warps stored = clock.end_program();
        for (auto& [key, race] : races_) {
            const Warps readers = std::get<2>(key) & (ended ? stored : ~Warps{0});
            if (!readers) continue;
            if (race.finding.is_store) race.finding.other_warp = only(readers);
            findings.add(race.finding, race.count);
        }
        races_.clear();
    }

    // Returns the number of the storage whose range an address lies in, and the bytes from its start; without one,
    // NOBODY and the address.
    std::pair<int32_t, int64_t> owner(uint64_t address) const {
        const uint64_t number = (address >> RANGE_BITS) - FIRST_RANGE;
        if (number >= storages.size()) return {NOBODY, static_cast<int64_t>(address)};
        return {static_cast<int32_t>(number), static_cast<int64_t>(address - storages[number].address)};
    }

    // Returns where an access to global memory goes; null where that is out of bounds.
    [[gnu::noinline]] uint8_t* global(uint64_t address, const Request& request) {
        if (const uint64_t at = address - TABLES; at < tables_.size() && at + request.bytes <= tables_.size() && request.access == Access::Read)
            return tables_.data() + at;
        const auto [owner, offset] = this->owner(address);
        Storage* storage = owner == NOBODY ? nullptr : &storages[owner];
        if (address % request.bytes) report(Fault::Misaligned, request, owner, offset);
        if (!storage || offset < 0 || offset + request.bytes > storage->size) {
            report(Fault::OutOfBounds, request, owner, offset);
            return nullptr;
        }
        uint8_t* place = storage->bytes + offset;
        if (storage->written) mark(*storage, request, owner, offset);
        storage->stored |= request.access != Access::Read;
        if (!checks_races_) return place;
        if (request.access != Access::Read) clock.store();
        const Conflict conflict = storage->history.note(clock, offset, request, place);
        if (conflict.overwrites) report(Fault::RaceBetweenThreads, request, owner, offset, conflict);
        else if (conflict.found && !harmless(conflict, request, place))
            report_race(conflict.between_programs ? Fault::RaceBetweenPrograms : Fault::RaceBetweenWarps, request,
                        owner, offset, conflict);
        return place;
    }

    // Returns where an access to shared memory goes; null where that is out of bounds.
    [[gnu::noinline]] uint8_t* shared(uint64_t address, const Request& request) {
        int64_t offset = static_cast<int64_t>(address);
        if (address % request.bytes) report(Fault::SharedMisaligned, request, NOBODY, offset);
        if (offset < 0 || offset + request.bytes > static_cast<int64_t>(shared_.size())) {
            report(Fault::SharedOutOfBounds, request, NOBODY, offset);
            return nullptr;
        }
        uint8_t* place = shared_.data() + offset;
        if (!checks_races_) return place;
        if (request.access != Access::Read) clock.store();
        const Conflict conflict = shared_history_.note(clock, offset, request, place);
        if (conflict.found && !harmless(conflict, request, place))
            report_race(Fault::SharedRace, request, NOBODY, offset, conflict);
        return place;
    }

    // Returns where an access to the memory of its thread alone goes; null where that is out of bounds.
    [[gnu::noinline]] uint8_t* local(uint64_t address, const Request& request) {
        if (address > local_bytes_ || address + request.bytes > local_bytes_) {
            report(Fault::OutOfBounds, request, NOBODY, static_cast<int64_t>(address));
            return nullptr;
        }
        return local_.data() + size_t{request.thread} * local_bytes_ + address;
    }

    [[gnu::noinline]] void report(Fault fault, const Request& request, int32_t owner, int64_t offset, const Conflict& conflict = {}) {
        findings.add(finding(fault, request, owner, offset, conflict));
    }

private:
    struct Race {
        Finding finding;
        uint64_t count = 0;
    };

    Finding finding(Fault fault, const Request& request, int32_t owner, int64_t offset, const Conflict& conflict) const {
        return {static_cast<int32_t>(fault), request.access != Access::Read, request.instruction.position,
                conflict.found ? static_cast<int32_t>(conflict.position) : NOBODY, clock.program, request.thread,
                conflict.program, only(conflict.warps), offset, owner, static_cast<int32_t>(request.bytes), 0};
    }

    // Whether a race with a reader counts is known when the program ends: see `Clock`.
    void report_race(Fault fault, const Request& request, int32_t owner, int64_t offset, const Conflict& conflict) {
        if (!conflict.readers) return report(fault, request, owner, offset, conflict);
        Race& race = races_[{fault, request.instruction.position, conflict.readers}];
        if (!race.count++) race.finding = finding(fault, request, owner, offset, conflict);
    }

    // The number of a single warp.
    static int32_t only(Warps warps) { return warps && !(warps & (warps - 1)) ? __builtin_ctz(warps) : NOBODY; }

    // Keeps the record of written bytes, and reports a read of others.
    void mark(Storage& storage, const Request& request, int32_t owner, int64_t offset) {
        uint8_t* flags = storage.written + offset;
        if (request.access != Access::Write && std::memchr(flags, 0, request.bytes))
            report(Fault::Uninitialised, request, owner, offset);
        if (request.access != Access::Read) std::memset(flags, 1, request.bytes);
    }

    // Warps of one program may write one value to one place: it does not matter which comes last.
    static bool harmless(const Conflict& conflict, const Request& request, const uint8_t* place) {
        return !conflict.between_programs && request.access == Access::Write && conflict.by_writes &&
               std::memcmp(place, request.stored, request.bytes) == 0;
    }

    std::vector<uint8_t> shared_;
    std::vector<uint8_t> local_;  // of all threads, one after the other
    uint64_t local_bytes_;        // of a thread
    std::vector<uint8_t> tables_;
    std::map<std::tuple<Fault, uint32_t, Warps>, Race> races_;  // by instruction and readers
    History shared_history_;
    bool checks_races_;
};

}  // namespace emulator
