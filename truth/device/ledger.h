// What the counted device owns up to: every byte that lives on it, and how many may.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>

#include <cstdint>
#include <mutex>
#include <vector>

namespace counted {

constexpr c10::DeviceType kDevice = c10::DeviceType::PrivateUse1;
inline c10::Device device() { return {kDevice, 0}; }

// Bytes and events of the one device. Everything is behind one lock: this is a witness, not a race.
struct Ledger {
  std::mutex lock;
  int64_t live_bytes = 0, peak_bytes = 0, total_bytes = 0, live_storages = 0;
  int64_t pinned_bytes = 0, pinned_peak_bytes = 0;
  int64_t capacity_bytes = -1;  // negative: none
  int64_t refused = 0, synchronisations = 0, streamed = 0;
  int64_t next_id = 0;
  bool is_recording = false;
  std::vector<int64_t> record;  // pairs: id + 1, bytes at a birth; -(id + 1), bytes at a death

  // Throws c10::OutOfMemoryError, having changed nothing, where the capacity would be passed.
  int64_t born(int64_t bytes);
  void died(int64_t id, int64_t bytes);
};
Ledger& ledger();

// Fresh bytes on the device, uninitialised.
c10::DataPtr allocate(size_t bytes);
// The bytes of a CPU storage, which from now on live on the device.
c10::DataPtr adopt(const c10::Storage& cpu);
c10::Allocator* allocator();

}  // namespace counted
