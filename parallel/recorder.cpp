// Recorder: a c10d backend that hands every operation on to the real one and notes it in a ring of shared memory.
//
//     trainer thread                              gloo thread
//     call    -> slot: group, seq, op, bytes
//     wait    -> slot.wait                        completion -> slot.end, slot.state
//
//     ring file:  | header 256 B | table of groups (JSON lines) | slots, 64 B each, one cache line, a power of two |
//
// A slot's `stamp` is its ticket + 1 and is stored last, so a reader in another process knows a torn slot. Nothing here
// takes the GIL after the call, and nothing is cleaned up on exit: the ring must tell what a rank did that hangs or died.
//
// Rules of this file: numbers and results are the inner backend's own. The ring's layout is the one that `record.py` reads.

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/extension.h>
#include <torch/version.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <functional>
#include <list>
#include <mutex>
#include <set>
#include <thread>

namespace {

using c10::intrusive_ptr;
using c10d::Backend;
using c10d::OpType;
using c10d::Work;
using Tensors = std::vector<at::Tensor>;

// The oldest torch that this was compiled with is 2.11, which has fewer operations.
#define HOLDFAST_NEW_C10D (TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13)
#if HOLDFAST_NEW_C10D
constexpr OpType kScatterCoalesced = OpType::REDUCE_SCATTER_TENSOR_COALESCED;
#else
constexpr OpType kScatterCoalesced = OpType::_REDUCE_SCATTER_BASE;
#endif

enum State : uint8_t { CALLED = 0, DONE = 1, FAILED = 2, ABORTED = 3 };
constexpr uint8_t kMark = 200;          // a line in the ring that is no operation: the trainer's step and phase
constexpr uint8_t kMonitoredBarrier = 201;
constexpr uint64_t kMagic = 0x31474e4952464c48;  // "HLFRING1"

struct Slot {
  std::atomic<uint64_t> stamp;
  uint32_t group;
  uint32_t seq;
  int32_t peer;  // rank in the group: of the other end, or the root; -1 where there is none
  uint8_t op;
  uint8_t dtype;
  std::atomic<uint8_t> state;
  uint8_t phase;
  uint64_t bytes;
  uint32_t shape;  // hash of what must be equal on all ranks, 0 where nothing must
  uint32_t step;
  int64_t call_ns;
  std::atomic<int64_t> wait_ns;
  std::atomic<int64_t> end_ns;
};
static_assert(sizeof(Slot) == 64);

struct Header {
  uint64_t magic;
  uint32_t num_slots;
  uint32_t table_bytes;
  int32_t rank;
  uint32_t pid;
  uint64_t start_ticks;  // of the process, from /proc, so that a recycled pid is not taken for it
  int64_t realtime_ns;   // both clocks, read at the same moment
  int64_t monotonic_ns;
  std::atomic<uint64_t> head;  // tickets given out
  std::atomic<uint32_t> step;
  std::atomic<uint32_t> phase;
  std::atomic<int64_t> mark_ns;
  std::atomic<uint32_t> table_used;
  uint32_t generation;
};
constexpr size_t kHeaderBytes = 256;
static_assert(sizeof(Header) <= kHeaderBytes);

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// Nanoseconds that this thread was ready and had no processor: what a busy machine adds to every duration.
uint64_t starved_ns() {
  thread_local const int file = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
  char text[64];
  const ssize_t size = file < 0 ? -1 : pread(file, text, sizeof(text) - 1, 0);
  if (size <= 0) return 0;
  text[size] = 0;
  unsigned long long ran = 0, waited = 0;
  return sscanf(text, "%llu %llu", &ran, &waited) == 2 ? waited : 0;
}

// One slot, as long as it is still ours: a lapped ring gives the slot to somebody else.
struct Entry {
  Slot* slot = nullptr;
  uint64_t stamp = 0;

  bool ours() const {
    return slot != nullptr && slot->stamp.load(std::memory_order_acquire) == stamp;
  }
  void waited(int64_t at) const {
    int64_t none = 0;
    if (ours()) slot->wait_ns.compare_exchange_strong(none, at, std::memory_order_relaxed);
  }
  void ended(State state) const {
    if (!ours() || slot->state.load(std::memory_order_relaxed) != CALLED) return;
    slot->end_ns.store(now_ns(), std::memory_order_relaxed);
    slot->state.store(state, std::memory_order_release);
  }
};

struct What {
  uint8_t op;
  int32_t peer = -1;
  uint8_t dtype = 0;
  uint64_t bytes = 0;
  uint32_t shape = 0;
};

// The mapping stays for the life of the process: operations in flight point into it.
class Ring {
 public:
  Ring(int fd, size_t size, uint32_t table_bytes) : table_bytes_(table_bytes) {
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    TORCH_CHECK(memory != MAP_FAILED, "recorder: the ring must be mappable, got errno ", errno);
    base_ = static_cast<char*>(memory);
    num_slots_ = 1;
    while (kHeaderBytes + table_bytes + 2 * num_slots_ * sizeof(Slot) <= size) num_slots_ *= 2;
  }

  void reset(int32_t rank, uint32_t pid, uint64_t start_ticks, uint32_t generation) {
    std::memset(base_, 0, kHeaderBytes + table_bytes_ + num_slots_ * sizeof(Slot));
    Header& h = header();
    h.num_slots = num_slots_;
    h.table_bytes = table_bytes_;
    h.rank = rank;
    h.pid = pid;
    h.start_ticks = start_ticks;
    h.generation = generation;
    timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    h.realtime_ns = int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
    h.monotonic_ns = now_ns();
    std::atomic_thread_fence(std::memory_order_release);
    h.magic = kMagic;
  }

  Entry begin(const What& what, uint32_t group, uint32_t seq) {
    Header& h = header();
    const uint64_t ticket = h.head.fetch_add(1, std::memory_order_relaxed);
    Slot& s = slots()[ticket & (num_slots_ - 1)];
    s.stamp.store(0, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
    s.group = group;
    s.seq = seq;
    s.peer = what.peer;
    s.op = what.op;
    s.dtype = what.dtype;
    s.state.store(CALLED, std::memory_order_relaxed);
    s.phase = uint8_t(h.phase.load(std::memory_order_relaxed));
    s.bytes = what.bytes;
    s.shape = what.shape;
    s.step = h.step.load(std::memory_order_relaxed);
    s.call_ns = now_ns();
    s.wait_ns.store(0, std::memory_order_relaxed);
    s.end_ns.store(0, std::memory_order_relaxed);
    s.stamp.store(ticket + 1, std::memory_order_release);
    return {&s, ticket + 1};
  }

  void mark(uint32_t step, uint8_t phase) {
    Header& h = header();
    h.step.store(step, std::memory_order_relaxed);
    h.phase.store(phase, std::memory_order_relaxed);
    h.mark_ns.store(now_ns(), std::memory_order_relaxed);
    What w;
    w.op = kMark;
    w.bytes = starved_ns();
    begin(w, 0, 0).ended(DONE);
  }

  bool add_line(const std::string& line) {
    std::lock_guard<std::mutex> lock(table_mutex_);
    Header& h = header();
    const uint32_t used = h.table_used.load();
    if (used + line.size() + 1 > table_bytes_) return false;
    std::memcpy(base_ + kHeaderBytes + used, line.data(), line.size());
    base_[kHeaderBytes + used + line.size()] = '\n';
    h.table_used.store(used + line.size() + 1, std::memory_order_release);
    return true;
  }

  void set_rank(int32_t rank) { header().rank = rank; }
  uint32_t num_slots() const { return num_slots_; }

 private:
  Header& header() { return *reinterpret_cast<Header*>(base_); }
  Slot* slots() { return reinterpret_cast<Slot*>(base_ + kHeaderBytes + table_bytes_); }

  char* base_;
  uint32_t table_bytes_;
  uint32_t num_slots_;
  std::mutex table_mutex_;
};

// What abort() closes: once closed, waits end and new operations are refused. Works that outlive it are buried, not
// freed: freeing one in the middle of a message waits for the peer.
class Gate {
 public:
  bool closed() const { return closed_.load(std::memory_order_acquire); }
  void check() const {
    if (closed()) C10_THROW_ERROR(DistBackendError, "recorder: the operation was aborted");
  }
  void close() {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_.store(true, std::memory_order_release);
    for (Work* work : transfers_) work->abort();
  }
  void enter(Work* transfer) {
    std::lock_guard<std::mutex> lock(mutex_);
    check();
    transfers_.insert(transfer);
  }
  void leave(Work* transfer) {
    std::lock_guard<std::mutex> lock(mutex_);
    transfers_.erase(transfer);
  }
  static void bury(const intrusive_ptr<Work>& work) {
    static std::mutex mutex;
    static auto* grave = new std::list<intrusive_ptr<Work>>();
    std::lock_guard<std::mutex> lock(mutex);
    grave->push_back(work);
  }

 private:
  std::atomic<bool> closed_{false};
  std::mutex mutex_;
  std::multiset<Work*> transfers_;
};

// An operation with futures. It waits on its own condition in slices, so that a closed gate frees it.
class RecordedWork : public Work {
 public:
  RecordedWork(std::vector<intrusive_ptr<Work>> inner, Entry entry, std::shared_ptr<Gate> gate, OpType op)
      : Work(-1, op), inner_(std::move(inner)), entry_(entry), gate_(std::move(gate)), left_(int(inner_.size())) {}

  static intrusive_ptr<Work> watch(
      std::vector<intrusive_ptr<Work>> inner, Entry entry, std::shared_ptr<Gate> gate, OpType op,
      std::function<void()> after = nullptr) {
    auto work = c10::make_intrusive<RecordedWork>(std::move(inner), entry, std::move(gate), op);
    work->after_ = std::move(after);
    for (const auto& part : work->inner_) {
      part->getFuture()->addCallback([work](c10::ivalue::Future& f) {
        work->part_done(f.hasError() ? f.exception_ptr() : nullptr);
      });
    }
    return work;
  }

  bool isCompleted() override { return Work::isCompleted(); }

  bool wait(std::chrono::milliseconds timeout) override {
    entry_.waited(now_ns());
    {
      std::unique_lock<std::mutex> lock(mutex_);
      const auto limit = std::chrono::steady_clock::now() + timeout;
      while (!completed_) {
        if (gate_->closed()) give_up(lock);
        cv_.wait_for(lock, kSlice, [&] { return completed_; });
        TORCH_CHECK(
            completed_ || timeout <= std::chrono::milliseconds(0) || std::chrono::steady_clock::now() < limit,
            "Operation timed out!");
      }
      if (exception_) std::rethrow_exception(exception_);
      if (after_) std::exchange(after_, nullptr)();
    }
    for (const auto& part : inner_) part->synchronize();
    return true;
  }

  void synchronize() override {
    for (const auto& part : inner_) part->synchronize();
  }
  Tensors result() override {
    inner_.front()->wait();
    return inner_.front()->result();
  }
  intrusive_ptr<c10::ivalue::Future> getFuture() override {
    TORCH_CHECK(!has_after_(), "recorder: this operation has no future, as in the backend itself; wait for it");
    return inner_.front()->getFuture();
  }
  uint64_t getSequencenumber() const override { return inner_.front()->getSequencenumber(); }

 private:
  static constexpr auto kSlice = std::chrono::milliseconds(50);

  bool has_after_() const { return inner_.size() != 1 || opType_ == OpType::_REDUCE_SCATTER_BASE; }

  void part_done(std::exception_ptr error) {
    std::exception_ptr first;
    {
      std::lock_guard<std::mutex> lock(parts_mutex_);
      if (error && !error_) error_ = error;
      if (--left_ > 0) return;
      first = error_;
    }
    entry_.ended(first ? FAILED : DONE);
    finish(first);
  }

  [[noreturn]] void give_up(std::unique_lock<std::mutex>& lock) {
    lock.unlock();
    entry_.ended(ABORTED);
    for (const auto& part : inner_) Gate::bury(part);
    C10_THROW_ERROR(DistBackendError, "recorder: the operation was aborted");
  }

  const std::vector<intrusive_ptr<Work>> inner_;
  const Entry entry_;
  const std::shared_ptr<Gate> gate_;
  std::function<void()> after_;
  std::mutex parts_mutex_;
  std::exception_ptr error_;
  int left_;
};

// An operation without a future (gloo's sends and receives): it completes in the waiter's hands.
class RecordedTransfer : public Work {
 public:
  RecordedTransfer(intrusive_ptr<Work> inner, Entry entry, std::shared_ptr<Gate> gate, OpType op)
      : Work(-1, op), inner_(std::move(inner)), entry_(entry), gate_(std::move(gate)) {}
  ~RecordedTransfer() override {
    if (gate_->closed()) Gate::bury(inner_);
  }

  bool wait(std::chrono::milliseconds timeout) override {
    entry_.waited(now_ns());
    bool done = false;
    gate_->enter(inner_.get());
    try {
      done = inner_->wait(timeout);
    } catch (...) {
      gate_->leave(inner_.get());
      entry_.ended(FAILED);
      throw;
    }
    gate_->leave(inner_.get());
    entry_.ended(done ? DONE : ABORTED);
    if (!done) gate_->check();
    return done;
  }
  bool isCompleted() override {
    const bool done = inner_->isCompleted();
    if (done) entry_.ended(inner_->isSuccess() ? DONE : FAILED);
    return done;
  }
  bool isSuccess() const override { return inner_->isSuccess(); }
  std::exception_ptr exception() const override { return inner_->exception(); }
  int sourceRank() const override { return inner_->sourceRank(); }
  Tensors result() override { return inner_->result(); }
  void synchronize() override { inner_->synchronize(); }
  void abort() override { inner_->abort(); }
  intrusive_ptr<c10::ivalue::Future> getFuture() override { return inner_->getFuture(); }
  uint64_t getSequencenumber() const override { return inner_->getSequencenumber(); }

 private:
  const intrusive_ptr<Work> inner_;
  const Entry entry_;
  const std::shared_ptr<Gate> gate_;
};

// On an accelerator nobody blocks in wait(): a thread looks at the streams. `wait_ns` is when this rank's stream reached
// the operation, `end_ns` when the operation ended, both to the millisecond of the poll. NCCL gives no work for an operation
// that its caller waits for: it is on the caller's own stream then, and has ended when what follows it there is reached.
class Poller {
 public:
  static Poller& get() {
    static auto* poller = new Poller();
    return *poller;
  }
  using Event = std::shared_ptr<c10::Event>;
  struct Pending {
    intrusive_ptr<Work> work;  // or none, and `after` instead
    Event reached, after;
    std::shared_ptr<Gate> gate;
    Entry entry;
  };

  void add(Pending pending) {
    std::lock_guard<std::mutex> lock(mutex_);
    pending_.push_back(std::move(pending));
    cv_.notify_one();
  }
  // What the caller's stream will have come to when it has done all that it has been given so far.
  static Event here(const Tensors& t) {
    if (t.empty() || t.front().is_cpu()) return nullptr;
    const auto device = t.front().device();
    auto event = std::make_shared<c10::Event>(device.type());
    event->record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
    return event;
  }

 private:
  Poller() { std::thread([this] { run(); }).detach(); }

  void run() {
    std::list<Pending> mine;
    while (true) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        if (mine.empty()) cv_.wait(lock, [&] { return !pending_.empty(); });
        mine.splice(mine.end(), pending_);
      }
      mine.remove_if([](Pending& p) { return look(p); });
      std::this_thread::sleep_for(std::chrono::microseconds(500));
    }
  }

  static bool look(Pending& p) {
    try {
      if (p.reached && p.reached->query()) {
        p.entry.waited(now_ns());
        p.reached.reset();
      }
      if (p.work ? !p.work->isCompleted() : p.after && !p.after->query()) return false;
      const bool failed = p.work && p.work->exception();  // NCCL's has no isSuccess any more
      p.entry.ended(failed ? FAILED : p.gate->closed() ? ABORTED : DONE);
    } catch (...) {
      p.entry.ended(FAILED);
    }
    return true;
  }

  std::mutex mutex_;
  std::condition_variable cv_;
  std::list<Pending> pending_;
};

uint32_t mix(uint32_t hash, uint64_t value) {
  for (int shift = 0; shift < 64; shift += 16) hash = (hash ^ uint32_t((value >> shift) & 0xffff)) * 16777619u;
  return hash;
}

// Bytes and dtype of what a rank puts in. The shape's hash is filled only where all ranks must agree.
What what(OpType op, const Tensors& tensors, bool alike, int64_t peer = -1) {
  What w;
  w.op = uint8_t(op);
  w.peer = int32_t(peer);
  uint32_t hash = 2166136261u;
  for (const auto& t : tensors) {
    w.bytes += t.nbytes();
    w.dtype = uint8_t(t.scalar_type());
    hash = mix(hash, uint64_t(t.scalar_type()));
    for (const auto extent : t.sizes()) hash = mix(hash, uint64_t(extent));
  }
  w.shape = alike ? (hash | 1u) : 0;
  return w;
}

class RecordingBackend : public Backend {
 public:
  RecordingBackend(intrusive_ptr<Backend> inner, Ring* ring, uint32_t group)
      : Backend(inner->getRank(), inner->getSize()),
        inner_(std::move(inner)),
        ring_(ring),
        group_(group),
        gate_(std::make_shared<Gate>()),
        sent_(size_ + 1),
        received_(size_ + 1),
        accelerated_(inner_->getBackendName() != "gloo"),
        gloo_(inner_->getBackendName() == "gloo") {
    setGroupUid(inner_->getGroupUid());
  }

  const std::shared_ptr<Gate>& gate() const { return gate_; }

  // ---- collectives ----
  intrusive_ptr<Work> broadcast(Tensors& t, const c10d::BroadcastOptions& o) override {
    return run(what(OpType::BROADCAST, t, true, o.rootRank), t, [&] { return inner_->broadcast(t, o); });
  }
  intrusive_ptr<Work> allreduce(Tensors& t, const c10d::AllreduceOptions& o) override {
    return run(what(OpType::ALLREDUCE, t, true), t, [&] { return inner_->allreduce(t, o); });
  }
  intrusive_ptr<Work> allreduce_sparse(Tensors& t, const c10d::AllreduceOptions& o) override {
    What w;
    w.op = uint8_t(OpType::_ALLREDUCE_SPARSE);
    return run(w, t, [&] { return inner_->allreduce_sparse(t, o); });
  }
  intrusive_ptr<Work> allreduce_coalesced(Tensors& t, const c10d::AllreduceCoalescedOptions& o) override {
    return run(what(OpType::ALLREDUCE_COALESCED, t, true), t, [&] { return inner_->allreduce_coalesced(t, o); });
  }
  intrusive_ptr<Work> reduce(Tensors& t, const c10d::ReduceOptions& o) override {
    return run(what(OpType::REDUCE, t, true, o.rootRank), t, [&] { return inner_->reduce(t, o); });
  }
  intrusive_ptr<Work> allgather(
      std::vector<Tensors>& out, Tensors& in, const c10d::AllgatherOptions& o) override {
    return run(what(OpType::ALLGATHER, in, true), in, [&] { return inner_->allgather(out, in, o); });
  }
  intrusive_ptr<Work> _allgather_base(at::Tensor& out, at::Tensor& in, const c10d::AllgatherOptions& o) override {
    const Tensors ins{in};
    return run(what(OpType::_ALLGATHER_BASE, ins, true), ins, [&] { return inner_->_allgather_base(out, in, o); });
  }
  intrusive_ptr<Work> allgather_coalesced(
      std::vector<Tensors>& out, Tensors& in, const c10d::AllgatherOptions& o) override {
    return run(what(OpType::ALLGATHER_COALESCED, in, true), in, [&] { return inner_->allgather_coalesced(out, in, o); });
  }
  intrusive_ptr<Work> allgather_into_tensor_coalesced(
      Tensors& out, Tensors& in, const c10d::AllgatherOptions& o) override {
    return run(what(OpType::ALLGATHER_COALESCED, in, true), in, [&] {
      return inner_->allgather_into_tensor_coalesced(out, in, o);
    });
  }
  intrusive_ptr<Work> gather(std::vector<Tensors>& out, Tensors& in, const c10d::GatherOptions& o) override {
    return run(what(OpType::GATHER, in, true, o.rootRank), in, [&] { return inner_->gather(out, in, o); });
  }
  intrusive_ptr<Work> scatter(Tensors& out, std::vector<Tensors>& in, const c10d::ScatterOptions& o) override {
    return run(what(OpType::SCATTER, out, true, o.rootRank), out, [&] { return inner_->scatter(out, in, o); });
  }
  intrusive_ptr<Work> reduce_scatter(
      Tensors& out, std::vector<Tensors>& in, const c10d::ReduceScatterOptions& o) override {
    return run(what(OpType::REDUCE_SCATTER, in.front(), true), out, [&] { return inner_->reduce_scatter(out, in, o); });
  }
  intrusive_ptr<Work> _reduce_scatter_base(
      at::Tensor& out, at::Tensor& in, const c10d::ReduceScatterOptions& o) override {
    Tensors outs{out}, ins{in};
    const What w = what(OpType::_REDUCE_SCATTER_BASE, ins, true);
    if (gloo_ && in.is_cpu()) return summed_scatter(w, outs, ins, o);
    return run(w, ins, [&] { return inner_->_reduce_scatter_base(out, in, o); });
  }
  intrusive_ptr<Work> reduce_scatter_tensor_coalesced(
      Tensors& out, Tensors& in, const c10d::ReduceScatterOptions& o) override {
    const What w = what(kScatterCoalesced, in, true);
    if (gloo_ && !in.empty() && in.front().is_cpu()) return summed_scatter(w, out, in, o);
    return run(w, in, [&] { return inner_->reduce_scatter_tensor_coalesced(out, in, o); });
  }
  intrusive_ptr<Work> alltoall_base(
      at::Tensor& out, at::Tensor& in, std::vector<int64_t>& out_splits, std::vector<int64_t>& in_splits,
      const c10d::AllToAllOptions& o) override {
    const Tensors ins{in};
    return run(what(OpType::ALLTOALL_BASE, ins, false), ins, [&] {
      return inner_->alltoall_base(out, in, out_splits, in_splits, o);
    });
  }
  intrusive_ptr<Work> alltoall(Tensors& out, Tensors& in, const c10d::AllToAllOptions& o) override {
    return run(what(OpType::ALLTOALL, in, false), in, [&] { return inner_->alltoall(out, in, o); });
  }
  intrusive_ptr<Work> barrier(const c10d::BarrierOptions& o) override {
    return run(what(OpType::BARRIER, {}, true), {}, [&] { return inner_->barrier(o); });
  }
  void monitoredBarrier(const c10d::BarrierOptions& o, bool all) override {
    gate_->check();
    What w;
    w.op = kMonitoredBarrier;
    const Entry entry = ring_->begin(w, group_, collectives_++);
    entry.waited(now_ns());
    try {
      inner_->monitoredBarrier(o, all);
    } catch (...) {
      entry.ended(FAILED);
      throw;
    }
    entry.ended(DONE);
  }

  // ---- point to point: numbered by pair and direction, so that send k meets receive k ----
  intrusive_ptr<Work> send(Tensors& t, int peer, int tag) override {
    return move(what(OpType::SEND, t, true, peer), t, sent_[peer]++, [&] { return inner_->send(t, peer, tag); });
  }
  intrusive_ptr<Work> recv(Tensors& t, int peer, int tag) override {
    return move(what(OpType::RECV, t, true, peer), t, received_[peer]++, [&] { return inner_->recv(t, peer, tag); });
  }
  intrusive_ptr<Work> recvAnysource(Tensors& t, int tag) override {
    return move(what(OpType::RECVANYSOURCE, t, false), t, received_[size_]++, [&] {
      return inner_->recvAnysource(t, tag);
    });
  }

  // ---- the rest of the backend, handed on ----
  const std::string getBackendName() const override { return inner_->getBackendName(); }
  intrusive_ptr<Options> getBackendOptions() override { return inner_->getBackendOptions(); }
  bool supportsSplitting() const override { return inner_->supportsSplitting(); }
  bool supportsCoalescing() const override { return inner_->supportsCoalescing(); }
  bool supportsTimeEstimation() const override { return inner_->supportsTimeEstimation(); }
  bool supportsShrinking() const override { return inner_->supportsShrinking(); }
  intrusive_ptr<Backend> shrink(
      const std::vector<int64_t>& ranks, int flags, const intrusive_ptr<Options>& o) override {
    return inner_->shrink(ranks, flags, o);
  }
  intrusive_ptr<Backend> split(
      const intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
      const intrusive_ptr<Options>& o) override {
    return inner_->split(store, ranks, o);
  }
  intrusive_ptr<Backend> merge(
      const intrusive_ptr<c10d::Store>& store, const intrusive_ptr<Options>& o, const int& rank,
      const int& size) override {
    return inner_->merge(store, o, rank, size);
  }
  void setTimeout(std::chrono::milliseconds timeout) override { inner_->setTimeout(timeout); }
  void startCoalescing() override { inner_->startCoalescing(); }
  intrusive_ptr<Work> endCoalescing() override { return inner_->endCoalescing(); }
  void setSequenceNumberForGroup() override { inner_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return inner_->getSequenceNumberForGroup(); }
  void registerOnCompletionHook(std::function<void(std::shared_ptr<c10d::WorkInfo>)>&& hook) override {
    inner_->registerOnCompletionHook(std::move(hook));
  }
  void waitForPendingWorks() override { inner_->waitForPendingWorks(); }
  void enableCollectivesTiming() override { inner_->enableCollectivesTiming(); }
  void setGroupUid(const std::string& uid) override {
    Backend::setGroupUid(uid);
    inner_->setGroupUid(uid);
  }
  void eagerConnectSingleDevice(at::Device device) override { inner_->eagerConnectSingleDevice(device); }
  c10d::ErrorType getError() override { return inner_->getError(); }
  std::shared_ptr<c10::Allocator> getMemAllocator() override { return inner_->getMemAllocator(); }
  at::Tensor allocateTensor(long size, at::TensorOptions o) override { return inner_->allocateTensor(size, o); }
  bool supportsTensorAlloc(c10::DeviceIndex device) override { return inner_->supportsTensorAlloc(device); }
#if HOLDFAST_NEW_C10D
  void suspend() override { inner_->suspend(); }
  void resume() override { inner_->resume(); }
  std::unordered_map<std::string, uint64_t> getMemoryStats() override { return inner_->getMemoryStats(); }
#endif
  // The process group also holds the inner backend and calls its abort() and shutdown() itself.
  void abort() override { gate_->close(); }
  void shutdown() override {}

 private:
  template <typename Call>
  intrusive_ptr<Work> run(const What& w, const Tensors& t, Call call) {
    gate_->check();
    const Entry entry = ring_->begin(w, group_, collectives_++);
    const auto reached = accelerated_ ? Poller::here(t) : nullptr;
    return follow(start(entry, call), entry, reached, t, OpType(w.op), false);
  }
  template <typename Call>
  intrusive_ptr<Work> move(const What& w, const Tensors& t, uint32_t seq, Call call) {
    gate_->check();
    const Entry entry = ring_->begin(w, group_, seq);
    const auto reached = accelerated_ ? Poller::here(t) : nullptr;
    return follow(start(entry, call), entry, reached, t, OpType(w.op), true);
  }
  template <typename Call>
  intrusive_ptr<Work> start(const Entry& entry, Call call) {
    try {
      return call();
    } catch (...) {
      entry.ended(FAILED);
      throw;
    }
  }

  intrusive_ptr<Work> follow(
      intrusive_ptr<Work> inner, Entry entry, Poller::Event reached, const Tensors& t, OpType op, bool transfer) {
    if (accelerated_) {
      Poller::get().add({inner, std::move(reached), inner ? nullptr : Poller::here(t), gate_, entry});
      return inner;
    }
    if (!inner) return inner;
    if (transfer || !has_future(*inner)) {
      return c10::make_intrusive<RecordedTransfer>(std::move(inner), entry, gate_, op);
    }
    return RecordedWork::watch({std::move(inner)}, entry, gate_, op);
  }

  static bool has_future(Work& work) {
    try {
      return work.getFuture() != nullptr;
    } catch (...) {
      return false;
    }
  }

  // gloo reduces and scatters by an all-reduce of a copy, waits for it inside a closure that cannot be timed or freed,
  // and cuts. The same steps here, so the same numbers, but with a completion to record and to abort.
  intrusive_ptr<Work> summed_scatter(
      const What& w, Tensors& out, Tensors& in, const c10d::ReduceScatterOptions& o) {
    gate_->check();
    TORCH_CHECK(out.size() == in.size(), "reduce_scatter: needs as many outputs as inputs");
    at::NoGradGuard no_grad;
    Tensors sums;
    for (size_t i = 0; i < in.size(); ++i) {
      TORCH_CHECK(
          out[i].numel() * size_ == in[i].numel() && out[i].dtype() == in[i].dtype(), "reduce_scatter: input must be ",
          size_, " outputs of the same dtype, got ", in[i].sizes(), " and ", out[i].sizes());
      sums.push_back(in[i].clone(at::MemoryFormat::Contiguous));
    }
    const Entry entry = ring_->begin(w, group_, collectives_++);
    std::vector<intrusive_ptr<Work>> parts;
    c10d::AllreduceOptions reduce;
    reduce.reduceOp = o.reduceOp;
    reduce.timeout = o.timeout;
    for (auto& sum : sums) {
      Tensors one{sum};
      parts.push_back(start(entry, [&] { return inner_->allreduce(one, reduce); }));
    }
    auto cut = [sums, out, rank = rank_, size = size_] {
      at::NoGradGuard no_grad;
      for (size_t i = 0; i < out.size(); ++i)
        out[i].copy_(sums[i].view({size, -1}).select(0, rank).view(out[i].sizes()));
    };
    return RecordedWork::watch(std::move(parts), entry, gate_, OpType::_REDUCE_SCATTER_BASE, std::move(cut));
  }

  const intrusive_ptr<Backend> inner_;
  Ring* const ring_;
  const uint32_t group_;
  const std::shared_ptr<Gate> gate_;
  std::atomic<uint32_t> collectives_{0};
  std::vector<std::atomic<uint32_t>> sent_;
  std::vector<std::atomic<uint32_t>> received_;
  const bool accelerated_;
  const bool gloo_;
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<Ring, std::unique_ptr<Ring, py::nodelete>>(m, "Ring")
      .def(py::init<int, size_t, uint32_t>())
      .def("reset", &Ring::reset)
      .def("mark", &Ring::mark)
      .def("add_line", &Ring::add_line)
      .def("set_rank", &Ring::set_rank)
      .def_property_readonly("num_slots", &Ring::num_slots);
  py::class_<Gate, std::shared_ptr<Gate>>(m, "Gate")
      .def("close", &Gate::close, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("closed", &Gate::closed);
  m.def("wrap", [](const intrusive_ptr<Backend>& inner, Ring& ring, uint32_t group) {
    auto backend = c10::make_intrusive<RecordingBackend>(inner, &ring, group);
    auto gate = backend->gate();
    return std::make_pair(intrusive_ptr<Backend>(std::move(backend)), gate);
  });
  m.def("sizes", [] { return py::make_tuple(kHeaderBytes, sizeof(Slot), uint64_t(kMagic)); });
}
