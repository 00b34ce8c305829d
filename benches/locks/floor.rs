//! The floor: the raw RPCs of the same work through etcd-client, with nothing around them.

use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use etcd_client::{
    Compare, CompareOp, DeleteOptions, EventType, GetOptions, KvClient, PutOptions, SortOrder, SortTarget,
    Txn, TxnOp, WatchOptions, WatchStream,
};

use crate::common::crew::{Contender, Crew, take_turns};
use crate::common::line::Line;
use crate::common::{fresh, open};
use crate::load::Load;

const PEER: &str = "rust-etcd-client";

/// `n` tasks on one connection put their own key.
pub(crate) async fn put(load: &Load) -> Result<Line> {
    let client = load.connect().await?;
    let (value, prefix) = ("x".repeat(load.size), fresh("put"));
    let mut crew = Crew::default();
    for i in 0..load.n {
        let (mut kv, key, value) = (client.kv_client(), format!("{prefix}/{i}"), value.clone());
        crew.spawn(|mut recorder| async move {
            while recorder.working() {
                let start = Instant::now();
                kv.put(key.as_str(), value.as_str(), None).await?;
                recorder.done(Some(start.elapsed()));
            }
            Ok(recorder)
        });
    }
    crew.measure(PEER, load.run()).await
}

/// The least that locking and unlocking can cost: a transaction that creates a key on a lease if it is absent and reads
/// who is first, and one that deletes it if it is still the same. `n` tasks on one connection, each its own name.
pub(crate) async fn lock_pair(load: &Load) -> Result<Line> {
    let mut client = load.connect().await?;
    // Not kept alive, so it must outlast the run.
    let ttl = i64::try_from(load.ttl)? + i64::try_from((load.warm + load.dur).as_secs())? + 60;
    let lease = client.lease_grant(ttl, None).await?.id();
    let mut crew = Crew::default();
    for _ in 0..load.n {
        let (mut kv, prefix) = (client.kv_client(), fresh("pair") + "/");
        crew.spawn(|mut recorder| async move {
            let key = format!("{prefix}me");
            while recorder.working() {
                let start = Instant::now();
                let locked = kv.txn(create(&prefix, &key, lease)).await?;
                ensure!(locked.succeeded(), "the key exists");
                let revision = locked.header().context("no header")?.revision();
                ensure!(kv.txn(delete(&key, revision)).await?.succeeded(), "the key is gone");
                recorder.done(Some(start.elapsed()));
            }
            Ok(recorder)
        });
    }
    let line = crew.measure(PEER, load.run()).await?;
    client.lease_revoke(lease).await?;
    Ok(line)
}

fn create(prefix: &str, key: &str, lease: i64) -> Txn {
    let first =
        GetOptions::new().with_prefix().with_sort(SortTarget::Create, SortOrder::Ascend).with_limit(1);
    let first = TxnOp::get(prefix, Some(first));
    Txn::new()
        .when([Compare::create_revision(key, CompareOp::Equal, 0)])
        .and_then([TxnOp::put(key, "", Some(PutOptions::new().with_lease(lease))), first.clone()])
        .or_else([TxnOp::get(key, None), first])
}

fn delete(key: &str, created: i64) -> Txn {
    Txn::new()
        .when([Compare::create_revision(key, CompareOp::Equal, created)])
        .and_then([TxnOp::delete(key, None)])
}

/// A lease is granted and revoked, by `n` at once on one connection.
pub(crate) async fn lease(load: &Load) -> Result<Line> {
    let client = load.connect().await?;
    let ttl = i64::try_from(load.ttl)?;
    let mut crew = Crew::default();
    for _ in 0..load.n {
        let mut leases = client.lease_client();
        crew.spawn(|mut recorder| async move {
            while recorder.working() {
                let start = Instant::now();
                let id = leases.grant(ttl, None).await?.id();
                leases.revoke(id).await?;
                recorder.done(Some(start.elapsed()));
            }
            Ok(recorder)
        });
    }
    crew.measure(PEER, load.run()).await
}

/// A write on one connection, heard by a watch on another: from "write called" to "event in hand".
pub(crate) async fn watch(load: &Load) -> Result<Line> {
    let wanted = match load.mode.as_str() {
        "" => EventType::Put,
        "delete" => EventType::Delete,
        mode => bail!("no such mode: {mode}"),
    };
    let mut kv = load.connect().await?.kv_client();
    let key = fresh("watch");
    let mut events = watch_key(load, &key).await?;
    let mut crew = Crew::default();
    crew.spawn(|mut recorder| async move {
        while recorder.working() {
            if wanted == EventType::Delete {
                kv.put(key.as_str(), "", None).await?;
            }
            let start = Instant::now();
            let write = async {
                match wanted {
                    EventType::Put => kv.put(key.as_str(), "", None).await.map(drop),
                    EventType::Delete => kv.delete(key.as_str(), None).await.map(drop),
                }
            };
            let heard = async {
                while count(&mut events, wanted).await? == 0 {}
                anyhow::Ok(start.elapsed())
            };
            let (written, heard) = tokio::join!(write, heard);
            written?;
            recorder.done(Some(heard?));
        }
        Ok(recorder)
    });
    crew.measure(PEER, load.run()).await
}

/// The least a fair hand-off can cost: `n` holders in a ring, each with one long-lived watch on the key of the one
/// before it. A holder deletes its key, which is the release, and puts it again, to queue for its next turn.
pub(crate) async fn handoff(load: &Load) -> Result<Line> {
    let ring = fresh("ring");
    let key = |i: usize| format!("{ring}/{i}");
    let holder = async |i: usize| {
        let mut kv = load.connect().await?.kv_client();
        let events = watch_key(load, &key((i + load.n - 1) % load.n)).await?;
        kv.put(key(i), "", None).await?;
        Ok(RingHolder { kv, own: key(i), events, releases: 0 })
    };
    let mut holders = open(load.n, holder).await?;
    if let Some(first) = holders.first_mut() {
        first.releases = 1;
    }
    let line = take_turns(PEER, load.run(), load.own.hold, holders).await?;
    load.connect().await?.delete(ring, Some(DeleteOptions::new().with_prefix())).await?;
    Ok(line)
}

struct RingHolder {
    kv: KvClient,
    own: String,
    /// Of the key of the holder before.
    events: WatchStream,
    /// How often that was released without a turn of ours since.
    releases: usize,
}

impl Contender for RingHolder {
    type Hold = ();

    async fn acquire(&mut self) -> Result<()> {
        while self.releases == 0 {
            self.releases += count(&mut self.events, EventType::Delete).await?;
        }
        self.releases -= 1;
        Ok(())
    }

    async fn release(&mut self, (): ()) -> Result<()> {
        self.kv.delete(self.own.as_str(), None).await?;
        self.kv.put(self.own.as_str(), "", None).await?;
        Ok(())
    }
}

/// Opens a watch of one key on a connection of its own, and waits until it runs.
async fn watch_key(load: &Load, key: &str) -> Result<WatchStream> {
    let mut events = load.connect().await?.watch(key, Some(WatchOptions::new())).await?;
    let created = events.message().await?.context("no watch")?;
    ensure!(created.created(), "the watch does not begin with its creation");
    Ok(events)
}

/// Waits for a message and counts its events of one type.
async fn count(events: &mut WatchStream, wanted: EventType) -> Result<usize> {
    let message = events.message().await?.context("the watch ended")?;
    Ok(message.events().iter().filter(|event| event.event_type() == wanted).count())
}
