// The counted device to torch: its allocator, its streams and events, its generator, its pinned memory.
//
// Memory is the host's, and work is done in the order it is asked for: a missing synchronisation shows in nothing here.
#include "ledger.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/tensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <map>

namespace counted {

Ledger& ledger() {
  static Ledger* one = new Ledger();  // never destroyed: tensors may outlive static destructors
  return *one;
}

int64_t Ledger::born(int64_t bytes) {
  std::lock_guard<std::mutex> guard(lock);
  if (capacity_bytes >= 0 && live_bytes + bytes > capacity_bytes) {
    refused++;
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "The counted device is out of memory. Tried to allocate ", bytes, " bytes; ",
        live_bytes, " of ", capacity_bytes, " bytes are in use.");
  }
  live_bytes += bytes;
  total_bytes += bytes;
  live_storages++;
  peak_bytes = std::max(peak_bytes, live_bytes);
  if (is_recording) record.insert(record.end(), {next_id + 1, bytes});
  return next_id++;
}

void Ledger::died(int64_t id, int64_t bytes) {
  std::lock_guard<std::mutex> guard(lock);
  live_bytes -= bytes;
  live_storages--;
  if (is_recording) record.insert(record.end(), {-(id + 1), bytes});
}

namespace {

// What a DataPtr of the device holds on to: its own host memory, or a CPU storage that it has taken over.
struct Held {
  c10::DataPtr own;
  c10::Storage adopted;
  int64_t id = 0;
  int64_t bytes = 0;
};

void let_go(void* context) {
  auto* held = static_cast<Held*>(context);
  const auto id = held->id, bytes = held->bytes;
  delete held;  // first, so that nobody who looks meanwhile takes what is still there for the host's own
  ledger().died(id, bytes);
}

c10::DataPtr nothing() { return {nullptr, nullptr, &c10::detail::deleteNothing, device()}; }

struct CountedAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override { return counted::allocate(bytes); }
  c10::DeleterFnPtr raw_deleter() const override { return &let_go; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}  // nothing is cached
  void recordStream(const c10::DataPtr&, c10::Stream) override { ledger().streamed++; }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    auto& seen = ledger();
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* kind : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
      (*kind)[0].current = seen.live_bytes;
      (*kind)[0].peak = seen.peak_bytes;
      (*kind)[0].allocated = seen.total_bytes;
      (*kind)[0].freed = seen.total_bytes - seen.live_bytes;
    }
    stats.num_ooms = seen.refused;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { ledger().peak_bytes = ledger().live_bytes; }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    const int64_t most = ledger().capacity_bytes < 0 ? int64_t{1} << 40 : ledger().capacity_bytes;
    return {static_cast<size_t>(std::max<int64_t>(0, most - ledger().live_bytes)), static_cast<size_t>(most)};
  }
};
CountedAllocator device_allocator;

// Pinned host memory is counted too: where it begins, and how far it goes.
std::map<const char*, size_t>& pinned() {
  static auto* one = new std::map<const char*, size_t>();
  return *one;
}

void unpin(void* context) {
  auto* own = static_cast<c10::DataPtr*>(context);
  {
    std::lock_guard<std::mutex> guard(ledger().lock);
    const auto found = pinned().find(static_cast<const char*>(own->get()));
    if (found != pinned().end()) {
      ledger().pinned_bytes -= static_cast<int64_t>(found->second);
      pinned().erase(found);
    }
  }
  delete own;
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* own = new c10::DataPtr(c10::GetCPUAllocator()->allocate(bytes));
    if (own->get() != nullptr) {
      std::lock_guard<std::mutex> guard(ledger().lock);
      pinned()[static_cast<const char*>(own->get())] = bytes;
      ledger().pinned_bytes += static_cast<int64_t>(bytes);
      ledger().pinned_peak_bytes = std::max(ledger().pinned_peak_bytes, ledger().pinned_bytes);
    }
    return {own->get(), own, &unpin, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
PinnedAllocator pinned_allocator;

thread_local c10::StreamId current_stream = 0;
std::atomic<c10::StreamId> streams{0};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(c10::StreamId id) { return c10::Stream(c10::Stream::UNSAFE, device(), id); }
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(++streams); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(++streams); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    return stream(std::exchange(current_stream, next.id()));
  }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new char;  // all work is done when it is asked for: an event says nothing more
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { ledger().synchronisations++; }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<char*>(event); }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { ledger().synchronisations++; }
  void synchronizeDevice(const c10::DeviceIndex) const override { ledger().synchronisations++; }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override { ledger().streamed++; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> guard(ledger().lock);
    const auto* at = static_cast<const char*>(data);
    auto next = pinned().upper_bound(at);
    return next != pinned().begin() && at < (--next)->first + next->second;
  }
  c10::Device getDeviceFromPtr(void*) const override { return device(); }
  // Random numbers are the CPU's, so that a seed means the same here as there.
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const auto* one = new at::Generator(at::detail::createCPUGenerator());
    return *one;
  }
};
Hooks hooks;

std::vector<int64_t> stats() {
  auto& seen = ledger();
  return {seen.live_bytes, seen.peak_bytes, seen.live_storages, seen.pinned_bytes, seen.pinned_peak_bytes,
          seen.capacity_bytes, seen.refused, seen.synchronisations, seen.streamed};
}

void reset_peak() {
  ledger().peak_bytes = ledger().live_bytes;
  ledger().pinned_peak_bytes = ledger().pinned_bytes;
}

at::Tensor recorded(bool is_recording) {
  auto& seen = ledger();
  std::vector<int64_t> taken;
  {
    std::lock_guard<std::mutex> guard(seen.lock);
    taken.swap(seen.record);
    seen.is_recording = is_recording;
  }
  return at::tensor(taken, at::TensorOptions().dtype(at::kLong));
}

const bool is_registered = [] {
  c10::SetAllocator(kDevice, &device_allocator);
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

}  // namespace

c10::Allocator* allocator() { return &device_allocator; }

c10::DataPtr allocate(size_t bytes) {
  if (bytes == 0) return nothing();
  auto held = std::make_unique<Held>();
  held->bytes = static_cast<int64_t>(bytes);
  held->id = ledger().born(held->bytes);
  try {
    held->own = c10::GetCPUAllocator()->allocate(bytes);
  } catch (...) {
    ledger().died(held->id, held->bytes);
    throw;
  }
  void* data = held->own.get();
  return {data, held.release(), &let_go, device()};
}

c10::DataPtr adopt(const c10::Storage& cpu) {
  if (cpu.nbytes() == 0) return nothing();
  auto held = std::make_unique<Held>();
  held->bytes = static_cast<int64_t>(cpu.nbytes());
  held->adopted = cpu;
  held->id = ledger().born(held->bytes);
  return {const_cast<void*>(cpu.data()), held.release(), &let_go, device()};
}

}  // namespace counted

TORCH_LIBRARY(counted, m) {
  m.def("stats() -> int[]", &counted::stats);
  m.def("reset_peak() -> ()", &counted::reset_peak);
  m.def("set_capacity(int capacity_bytes) -> ()", [](int64_t bytes) { counted::ledger().capacity_bytes = bytes; });
  m.def("recorded(bool is_recording) -> Tensor", &counted::recorded);
  m.def("synchronize() -> ()", [] { counted::ledger().synchronisations++; });
  m.def("seed(int seed) -> ()", [](int64_t seed) {
    at::Generator all = at::detail::getPrivateUse1Hooks().getDefaultGenerator(0);
    all.set_current_seed(static_cast<uint64_t>(seed));
  });
}
