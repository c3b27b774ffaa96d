#include "errors.h"
#include "put_signal.h"

namespace efa_ep::put_signal {
namespace {

/// Bare puts: no write tells its target anything, and its completion means that it is there.
class Silent final : public Fabric {
 public:
  explicit Silent(Fabric& fabric) : fabric_(fabric) {}
  const FabricDescription& description() const override { return fabric_.description(); }
  void register_memory(std::byte* base, size_t bytes) override { fabric_.register_memory(base, bytes); }
  std::vector<std::byte> address() const override { return fabric_.address(); }
  void connect(uint32_t peer, std::span<const std::byte> address) override { fabric_.connect(peer, address); }
  PostResult post_write(const WriteRequest& request) override {
    WriteRequest silent = request;
    silent.notify = false;
    silent.delivered = true;
    return fabric_.post_write(silent);
  }
  size_t poll(std::span<Completion> completions) override { return fabric_.poll(completions); }

 private:
  Fabric& fabric_;
};

}  // namespace

Rank::Rank(Fabric& fabric, Method method, const Cell& cell, uint32_t rank, const DeadlineClock& clock)
    : cell_(cell), rank_(rank), words_(TilePuts::words(cell.ranks, 1)) {
  if (method) {
    policy_ = SignalPolicy::create(*method, fabric, clock);
  } else {
    silent_ = std::make_unique<Silent>(fabric);
  }
  tiles_ = std::make_unique<TilePuts>(method ? static_cast<Fabric&>(*policy_) : *silent_, words_,
                                      TilePutOptions{.rank = rank, .ranks = cell.ranks, .clock = &clock});
}

/// Transfers are dealt out from the next rank on.
uint32_t Rank::transfers_to(uint32_t source, uint32_t peer) const {
  const uint32_t others = cell_.ranks - 1;
  const uint32_t place = (peer + cell_.ranks - source) % cell_.ranks - 1;
  return cell_.transfers / others + (place < cell_.transfers % others ? 1 : 0);
}

void Rank::begin() {
  ++run_;
  for (uint32_t i = 0; i < cell_.transfers; ++i) {
    const uint32_t peer = (rank_ + 1 + i % (cell_.ranks - 1)) % cell_.ranks;
    const uint64_t place = uint64_t{i % kPlaces} * cell_.bytes;
    const TilePut put{.peer = peer,
                      .transfers = transfers_to(rank_, peer),
                      .bytes = cell_.bytes,
                      .local_offset = place,
                      .remote_offset = uint64_t{kPlaces} * cell_.bytes + place};
    if (!tiles_->try_submit(put)) throw ConfigurationError("the ring is smaller than a run");
  }
}

bool Rank::finished() const {
  if (!tiles_->idle()) return false;
  if (silent_) return true;
  for (uint32_t source = 0; source < cell_.ranks; ++source) {
    if (source == rank_ || transfers_to(source, rank_) == 0) continue;
    if (tiles_->signal(source, 0) < run_) return false;
  }
  return true;
}

}  // namespace efa_ep::put_signal
