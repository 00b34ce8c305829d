//! A random request, and what came of it in a form that can be compared.

use etcd_client::proto::{PbTxnOpResponse, PbTxnResponse};
use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, Error, GetOptions, KeyValue, LeaseGrantOptions,
    LeaseTimeToLiveOptions, PutOptions, SortOrder, SortTarget, Txn, TxnOp,
};
use fastrand::Rng;

use super::observer::{Observer, Wish};

/// Leases in play.
const LEASES: i64 = 4;
/// A TTL that no run outlives, in seconds.
const TTL: i64 = 10_000;

/// One request.
#[derive(Debug, Clone)]
pub(super) enum Operation {
    Range(Range),
    Put(Put),
    Delete(Delete),
    Txn(Nested),
    Compact(i64),
    Grant(i64),
    Revoke(i64),
    Renew(i64),
    TimeToLive(i64),
    Leases,
    Watch(Wish),
    CancelWatch(usize),
    Progress,
}

#[derive(Debug, Clone)]
pub(super) struct Range {
    keys: Keys,
    limit: i64,
    revision: i64,
    sort: Option<(usize, bool)>,
    keys_only: bool,
    count_only: bool,
    serializable: bool,
    bounds: [i64; 4],
}

#[derive(Debug, Clone)]
pub(super) struct Put {
    key: Vec<u8>,
    value: Vec<u8>,
    lease: i64,
    prev: bool,
    ignore_value: bool,
    ignore_lease: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Delete {
    keys: Keys,
    prev: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Nested {
    compares: Vec<Condition>,
    then: Vec<Step>,
    or_else: Vec<Step>,
}

#[derive(Debug, Clone)]
struct Condition {
    keys: Keys,
    target: usize,
    op: usize,
    number: i64,
    value: Vec<u8>,
}

#[derive(Debug, Clone)]
enum Step {
    Range(Range),
    Put(Put),
    Delete(Delete),
    Txn(Nested),
}

/// A key, a range of keys, or all keys from one on.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    pub(super) key: Vec<u8>,
    pub(super) end: Vec<u8>,
}

/// What came of an operation.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) revision: i64,
    pub(super) what: String,
}

fn key(random: &mut Rng) -> Vec<u8> {
    const KEYS: [&[u8]; 12] =
        [b"a", b"a/1", b"a/2", b"a/2/x", b"a0", b"b", b"b/1", b"b\xff", b"\xff\xff", b"c", b"c/\0", b"\0"];
    random.choice(KEYS).unwrap_or(b"a").to_vec()
}

impl Keys {
    pub(super) fn random(random: &mut Rng) -> Self {
        let first = key(random);
        let end = match random.u8(..10) {
            0..5 => Vec::new(),
            5 => b"\0".to_vec(),
            6 => [first.as_slice(), b"\xff"].concat(),
            // Sometimes before the first.
            _ => key(random),
        };
        Self { key: first, end }
    }

    /// The same, but never all keys from one on: of such a deletion etcd does not see that a put of the same transaction
    /// meets it, and ends itself when it does.
    fn closed(random: &mut Rng) -> Self {
        let mut keys = Self::random(random);
        if keys.end == b"\0" {
            keys.end.clear();
        }
        keys
    }
}

impl Operation {
    pub(super) fn random(random: &mut Rng, revision: i64) -> Self {
        let lease = random.i64(0..=LEASES);
        match random.u16(..1000) {
            0..250 => Self::Put(put(random)),
            250..450 => Self::Range(range(random, revision)),
            450..550 => Self::Delete(Delete { keys: Keys::random(random), prev: random.bool() }),
            550..850 => Self::Txn(nested(random, revision, 2)),
            850..870 => Self::Grant(lease.max(1)),
            870..880 => Self::Revoke(lease.max(1)),
            880..890 => Self::Renew(lease.max(1)),
            890..900 => Self::TimeToLive(lease.max(1)),
            900..905 => Self::Leases,
            905..910 => Self::Compact(random.i64(-1..=revision + 2)),
            910..960 => Self::Watch(Wish::random(random, revision)),
            960..990 => Self::CancelWatch(random.usize(..64)),
            _ => Self::Progress,
        }
    }

    /// Whether all that happened before must have been told: what etcd has not told yet when it compacts is lost.
    pub(super) fn needs_quiet(&self) -> bool {
        matches!(self, Self::Compact(_) | Self::CancelWatch(_) | Self::Progress)
    }

    pub(super) async fn run(&self, client: &mut Client, observer: &mut Observer) -> Answer {
        match self {
            Self::Range(range) => {
                answer(client.get(range.keys.key.clone(), Some(range.options())).await, |got| {
                    (got.header(), format!("{} {} {:?}", got.count(), got.more(), range.show(got.kvs())))
                })
            }
            Self::Put(put) => {
                answer(client.put(put.key.clone(), put.value.clone(), Some(put.options())).await, |done| {
                    (done.header(), format!("{:?}", done.prev_key().map(show)))
                })
            }
            Self::Delete(delete) => {
                answer(client.delete(delete.keys.key.clone(), Some(delete.options())).await, |done| {
                    let before: Vec<_> = done.prev_kvs().iter().map(show).collect();
                    (done.header(), format!("{} {before:?}", done.deleted()))
                })
            }
            Self::Txn(txn) => {
                answer(client.txn(txn.build()).await, |done| (done.header(), txn.show(&done.0)))
            }
            Self::Compact(revision) => {
                answer(client.compact(*revision, None).await, |done| (done.header(), String::new()))
            }
            Self::Grant(id) => {
                let options = LeaseGrantOptions::new().with_id(*id);
                answer(client.lease_grant(TTL, Some(options)).await, |done| {
                    (done.header(), format!("{} {}", done.id(), done.ttl()))
                })
            }
            Self::Revoke(id) => answer(client.lease_revoke(*id).await, |done| (done.header(), String::new())),
            Self::Renew(id) => {
                let renewed = client.lease_keep_alive(*id).await;
                let what = renewed.map_or_else(|error| error.to_string(), |_| "renewed".into());
                Answer { revision: 0, what }
            }
            Self::TimeToLive(id) => {
                let options = LeaseTimeToLiveOptions::new().with_keys();
                answer(client.lease_time_to_live(*id, Some(options)).await, |done| {
                    let mut keys = done.keys().to_vec();
                    keys.sort();
                    (done.header(), format!("{} {} {keys:?}", done.ttl() > 0, done.granted_ttl()))
                })
            }
            Self::Leases => answer(client.leases().await, |done| {
                let mut ids: Vec<_> = done.leases().iter().map(etcd_client::LeaseStatus::id).collect();
                ids.sort_unstable();
                (done.header(), format!("{ids:?}"))
            }),
            Self::Watch(wish) => Answer { revision: 0, what: observer.watch(wish).await },
            Self::CancelWatch(which) => Answer { revision: 0, what: observer.cancel(*which).await },
            Self::Progress => Answer { revision: 0, what: observer.progress().await },
        }
    }
}

fn put(random: &mut Rng) -> Put {
    let rarely = random.u8(..20);
    Put {
        key: if random.u8(..100) == 0 { Vec::new() } else { key(random) },
        value: vec![b'v'; random.usize(..3)],
        lease: if random.u8(..3) == 0 { random.i64(1..=LEASES) } else { 0 },
        prev: random.bool(),
        ignore_value: rarely == 0,
        ignore_lease: rarely == 1,
    }
}

fn range(random: &mut Rng, revision: i64) -> Range {
    let near = |random: &mut Rng| random.i64((revision - 10).max(0)..=revision + 1);
    let mut bounds = [0; 4];
    for bound in &mut bounds {
        if random.u8(..10) == 0 {
            *bound = near(random);
        }
    }
    Range {
        keys: Keys::random(random),
        limit: random.i64(-1..4),
        revision: if random.u8(..3) == 0 { near(random) } else { 0 },
        sort: random.bool().then(|| (random.usize(..5), random.bool())),
        keys_only: random.u8(..5) == 0,
        count_only: random.u8(..8) == 0,
        serializable: random.u8(..3) == 0,
        bounds,
    }
}

fn nested(random: &mut Rng, revision: i64, depth: usize) -> Nested {
    let conditions = (0..random.usize(..3)).map(|_| Condition {
        keys: Keys::random(random),
        target: random.usize(..5),
        op: random.usize(..4),
        number: match random.u8(..3) {
            0 => 0,
            1 => random.i64(0..4),
            _ => random.i64((revision - 20).max(0)..=revision),
        },
        value: vec![b'v'; random.usize(..3)],
    });
    let compares = conditions.collect();
    let steps = |random: &mut Rng| -> Vec<Step> {
        (0..random.usize(..4))
            .map(|_| match random.u8(..10) {
                0..3 => Step::Range(range(random, revision)),
                3..7 => Step::Put(Put { ignore_value: false, ignore_lease: false, ..put(random) }),
                7..9 => Step::Delete(Delete { keys: Keys::closed(random), prev: random.bool() }),
                _ if depth == 0 => Step::Range(range(random, revision)),
                _ => Step::Txn(nested(random, revision, depth - 1)),
            })
            .collect()
    };
    Nested { compares, then: steps(random), or_else: steps(random) }
}

impl Range {
    fn options(&self) -> GetOptions {
        let [min_mod, max_mod, min_create, max_create] = self.bounds;
        let mut options = GetOptions::new()
            .with_limit(self.limit)
            .with_revision(self.revision)
            .with_min_mod_revision(min_mod)
            .with_max_mod_revision(max_mod)
            .with_min_create_revision(min_create)
            .with_max_create_revision(max_create);
        if !self.keys.end.is_empty() {
            options = options.with_range(self.keys.end.clone());
        }
        if let Some((target, ascending)) = self.sort {
            let order = if ascending { SortOrder::Ascend } else { SortOrder::Descend };
            options = options.with_sort(TARGETS[target], order);
        }
        if self.keys_only {
            options = options.with_keys_only();
        }
        if self.count_only {
            options = options.with_count_only();
        }
        if self.serializable {
            options = options.with_serializable();
        }
        options
    }

    /// The keys found, those that sort alike in the order of their names: etcd's sort is not stable. With a limit, which
    /// of the last ones that sort alike are there is open, so only their number counts.
    fn show(&self, found: &[KeyValue]) -> Vec<String> {
        let Some((target, _)) = self.sort.filter(|(target, _)| *target != 0) else {
            return found.iter().map(show).collect();
        };
        let by = |kv: &KeyValue| match target {
            1 => format!("{:020}", kv.version()),
            2 => format!("{:020}", kv.create_revision()),
            3 => format!("{:020}", kv.mod_revision()),
            _ => String::from_utf8_lossy(kv.value()).into_owned(),
        };
        let last = found.last().map(by).filter(|_| self.limit > 0);
        let mut shown: Vec<(usize, String)> = Vec::new();
        let (mut group, mut before) = (0, None);
        for kv in found {
            let now = by(kv);
            group += usize::from(before.as_ref().is_some_and(|before| *before != now));
            let text = if last.as_ref() == Some(&now) { now.clone() } else { show(kv) };
            // Without values, what they were sorted by cannot be seen.
            shown.push((if self.keys_only && target == 4 { 0 } else { group }, text));
            before = Some(now);
        }
        shown.sort();
        shown.into_iter().map(|(_, text)| text).collect()
    }
}

const TARGETS: [SortTarget; 5] =
    [SortTarget::Key, SortTarget::Version, SortTarget::Create, SortTarget::Mod, SortTarget::Value];

impl Put {
    fn options(&self) -> PutOptions {
        let mut options = PutOptions::new();
        if self.lease != 0 {
            options = options.with_lease(self.lease);
        }
        if self.prev {
            options = options.with_prev_key();
        }
        if self.ignore_value {
            options = options.with_ignore_value();
        }
        if self.ignore_lease {
            options = options.with_ignore_lease();
        }
        options
    }
}

impl Delete {
    fn options(&self) -> DeleteOptions {
        let mut options = DeleteOptions::new();
        if !self.keys.end.is_empty() {
            options = options.with_range(self.keys.end.clone());
        }
        if self.prev { options.with_prev_key() } else { options }
    }
}

impl Condition {
    fn build(&self) -> Compare {
        let op = [CompareOp::Equal, CompareOp::Greater, CompareOp::Less, CompareOp::NotEqual][self.op];
        let key = self.keys.key.clone();
        let compare = match self.target {
            0 => Compare::version(key, op, self.number % 4),
            1 => Compare::create_revision(key, op, self.number),
            2 => Compare::mod_revision(key, op, self.number),
            3 => Compare::value(key, op, self.value.clone()),
            _ => Compare::lease(key, op, self.number % (LEASES + 1)),
        };
        if self.keys.end.is_empty() { compare } else { compare.with_range(self.keys.end.clone()) }
    }
}

impl Nested {
    fn build(&self) -> Txn {
        let steps = |steps: &[Step]| -> Vec<TxnOp> { steps.iter().map(Step::build).collect() };
        Txn::new()
            .when(self.compares.iter().map(Condition::build).collect::<Vec<_>>())
            .and_then(steps(&self.then))
            .or_else(steps(&self.or_else))
    }

    fn show(&self, done: &PbTxnResponse) -> String {
        let steps = if done.succeeded { &self.then } else { &self.or_else };
        let shown: Vec<String> =
            steps.iter().zip(&done.responses).map(|(step, op)| step.show(op.response.as_ref())).collect();
        format!("{} {} {shown:?}", done.succeeded, done.responses.len())
    }
}

impl Step {
    fn build(&self) -> TxnOp {
        match self {
            Self::Range(range) => TxnOp::get(range.keys.key.clone(), Some(range.options())),
            Self::Put(put) => TxnOp::put(put.key.clone(), put.value.clone(), Some(put.options())),
            Self::Delete(delete) => TxnOp::delete(delete.keys.key.clone(), Some(delete.options())),
            Self::Txn(txn) => TxnOp::txn(txn.build()),
        }
    }

    fn show(&self, response: Option<&PbTxnOpResponse>) -> String {
        let revision = |header: &Option<etcd_client::proto::PbResponseHeader>| {
            header.as_ref().map(|header| header.revision)
        };
        match (self, response) {
            (Self::Range(range), Some(PbTxnOpResponse::ResponseRange(got))) => {
                let found: Vec<KeyValue> = got.kvs.iter().cloned().map(KeyValue).collect();
                format!("{:?} {} {} {:?}", revision(&got.header), got.count, got.more, range.show(&found))
            }
            (Self::Put(_), Some(PbTxnOpResponse::ResponsePut(done))) => {
                format!("{:?} {:?}", revision(&done.header), done.prev_kv)
            }
            (Self::Delete(_), Some(PbTxnOpResponse::ResponseDeleteRange(done))) => {
                format!("{:?} {} {:?}", revision(&done.header), done.deleted, done.prev_kvs)
            }
            (Self::Txn(txn), Some(PbTxnOpResponse::ResponseTxn(done))) => {
                format!("{:?} {}", revision(&done.header), txn.show(done))
            }
            other => format!("{other:?}"),
        }
    }
}

fn show(kv: &KeyValue) -> String {
    let key = kv.key().escape_ascii();
    let (created, modified, version, lease) =
        (kv.create_revision(), kv.mod_revision(), kv.version(), kv.lease());
    format!("{key}={} {created} {modified} {version} {lease}", kv.value().escape_ascii())
}

fn answer<T>(
    result: Result<T, Error>,
    what: impl FnOnce(&T) -> (Option<&etcd_client::ResponseHeader>, String),
) -> Answer {
    match result {
        Ok(response) => {
            let (header, what) = what(&response);
            Answer { revision: header.map_or(0, etcd_client::ResponseHeader::revision), what }
        }
        Err(Error::GRpcStatus(status)) => {
            Answer { revision: 0, what: format!("{:?}: {}", status.code(), status.message()) }
        }
        Err(error) => Answer { revision: 0, what: format!("{error:?}") },
    }
}
