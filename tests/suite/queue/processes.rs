//! Consumers that are processes, and are stopped and killed.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{GetOptions, Txn, TxnOp};
use etcd_recipes::{Queue, Session};
use tokio::sync::Semaphore;

use super::{claim, text};
use crate::support::check::{Scope, eventually, scoped, scoped_on};
use crate::support::child::{Child, Role, role};
use crate::support::faults::{Fault, Faults};
use crate::support::needs::{Needs, lacking};
use crate::support::server::{PATIENCE, Server};
use crate::support::sessions::session;
use crate::support::{full, rounds};

const TTL: Duration = Duration::from_secs(2);
/// How long after the death of a consumer, or etcd's start, its items are delivered again.
const REDELIVERY: Duration = Duration::from_millis(3500);
/// What a machine under load may add.
const LOAD: Duration = Duration::from_secs(4);
/// So many others may be delivered before it even then. A machine so loaded that nobody works at all is not at fault.
const OTHERS: usize = 100;
const CONSUMERS: usize = 8;
const PRODUCERS: usize = 8;
/// Items put and not acked.
const WAITING: usize = 5_000;
/// So often while the items are worked off, a consumer is killed that holds one.
const ROUNDS: usize = 10;
/// Of a thousand answers, so many are lost.
const LOST: u32 = 20;

fn start(scope: &Scope, task: &str) -> Child {
    let variables = [("ENDPOINT", scope.endpoint()), ("NAME", scope.name()), ("TASK", task)];
    Child::spawn("queue::processes::body", &variables)
}

#[test]
#[ignore = "run by other tests, in a process of its own"]
fn body() {
    let Some(role) = role() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        match role.variable("TASK").as_str() {
            "hold" => hold(role).await,
            "die" => die(role).await,
            _ => work(role).await,
        }
    });
}

/// A session that loses some of the answers to its transactions.
async fn unreliable(endpoint: &str) -> (Faults, Session) {
    let faults = Faults::new(endpoint);
    let random = std::sync::Mutex::new(fastrand::Rng::new());
    let arm = faults.on("Txn").when(move |_| random.lock().unwrap().u32(0..1000) < LOST);
    arm.always().inject(Fault::LoseAnswer);
    let session = Session::builder_with_client(faults.client().await).ttl(TTL).connect_timeout(PATIENCE);
    (faults, session.connect().await.expect("no session"))
}

fn done_key(name: &str, item: &str) -> String {
    format!("done/{name}/{item}")
}

/// Works until it is killed, or told to end. Told to hold, it keeps its next item.
async fn work(mut role: Role) {
    let name = role.variable("NAME");
    let (_faults, session) = unreliable(&role.variable("ENDPOINT")).await;
    let queue = Queue::new(&session, &name).unwrap();
    let mut holds = false;
    loop {
        let mut claim = tokio::select! {
            claim = queue.claim() => claim.unwrap(),
            told = role.hear() => {
                if told == "end" {
                    break;
                }
                holds = true;
                continue;
            }
        };
        let item = text(claim.value()).to_owned();
        if holds {
            role.say(format!("holds {item}"));
            std::future::pending::<()>().await;
        }
        role.say(format!("claimed {item}"));
        let write = Txn::new().and_then([TxnOp::put(done_key(&name, &item), "", None)]);
        // With the user's own write, or without.
        let acked = if item.ends_with('0') {
            claim.ack().await
        } else {
            claim.ack_with(write).await.map(|answer| assert!(answer.succeeded()))
        };
        if acked.is_ok() {
            role.say(format!("acked {item}"));
        }
    }
    drop(queue);
    session.close().await.unwrap();
}

/// Claims an item, and acks it when it is told.
async fn hold(mut role: Role) {
    let session = Session::builder([role.variable("ENDPOINT")]).ttl(TTL).connect().await.unwrap();
    let queue = Queue::new(&session, role.variable("NAME")).unwrap();
    let claimed = claim(&queue).await;
    role.say("claimed");
    role.hear().await;
    let held = claimed.is_held();
    let acked = claimed.ack().await;
    role.say(format!("{held} {}", acked.is_ok()));
    session.close().await.unwrap();
}

/// Has a handler that ends the process.
async fn die(role: Role) {
    let session = Session::builder([role.variable("ENDPOINT")]).ttl(TTL).connect().await.unwrap();
    let queue = Queue::builder(&session, role.variable("NAME")).max_attempts(3).build().unwrap();
    loop {
        let claimed = claim(&queue).await;
        role.say(format!("{} {}", text(claimed.value()), claimed.attempt()));
        if claimed.value() == b"poison" {
            std::process::abort();
        }
        claimed.ack().await.unwrap();
    }
}

#[tokio::test]
async fn a_consumer_that_was_stopped_past_its_lease_cannot_ack() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = Queue::new(&session, scope.name()).unwrap();
        queue.enqueue("work").await.unwrap();
        let mut stopped = start(scope, "hold");
        stopped.expect("claimed").await;
        stopped.pause();
        let again = claim(&queue).await;
        assert_eq!(again.attempt(), 2);
        stopped.resume();
        stopped.tell("ack");
        stopped.expect("false false").await;
        assert_eq!(queue.length().await.unwrap(), 1);
        again.ack().await.unwrap();
        stopped.wait().await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_item_of_a_killed_consumer_comes_back_in_time() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = Queue::new(&session, scope.name()).unwrap();
        let mut times = Vec::new();
        // A machine under load may stand still, but not each time.
        for _ in 0..5 {
            queue.enqueue("work").await.unwrap();
            let mut consumer = start(scope, "hold");
            consumer.expect("claimed").await;
            consumer.kill().await;
            let killed = Instant::now();
            claim(&queue).await.ack().await.unwrap();
            times.push(killed.elapsed());
        }
        assert!(times.iter().any(|time| *time < REDELIVERY), "{times:?}");
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_item_that_kills_its_consumers_is_delivered_exactly_as_often_as_it_may_be() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = Queue::new(&session, scope.name()).unwrap();
        queue.enqueue_all(["poison", "fine"]).await.unwrap();
        for attempt in 1..=3 {
            let mut consumer = start(scope, "die");
            let mut line = consumer.line().await;
            // While the claim of the dead one lasts, the next item comes.
            if line.starts_with("fine") {
                line = consumer.line().await;
            }
            assert_eq!(line, format!("poison {attempt}"));
            consumer.wait().await;
        }
        let consumer = start(scope, "die");
        eventually(PATIENCE, "it is given up", async || queue.dead_letters().await.unwrap().len() == 1).await;
        let letter = queue.dead_letters().await.unwrap().remove(0);
        assert_eq!((letter.value.as_slice(), letter.attempts), (&b"poison"[..], 3));
        consumer.kill().await;
        queue.purge(&letter).await.unwrap();
        assert_eq!(queue.length().await.unwrap(), 0);
        session.close().await.unwrap();
        eventually(PATIENCE, "the dead leave nothing", async || super::books(scope).await.is_empty()).await;
    })
    .await;
}

/// What the consumers said.
#[derive(Default)]
struct Story {
    put: Vec<String>,
    acked: HashMap<String, usize>,
    orphans: HashMap<String, Orphan>,
    /// How many consumers died with an item for sure, and how many of those were delivered again.
    died: usize,
    redelivered: usize,
    slowest: Duration,
    /// Redeliveries that came later than many others that had less right to.
    passed_over: Vec<String>,
    etcd_started: Option<Instant>,
    /// All that was said and done, to tell how a slow one came about.
    log: Vec<(Instant, String)>,
}

/// An item that a dead consumer had claimed.
struct Orphan {
    since: Instant,
    /// It was not acked, for sure.
    held: bool,
}

struct Worker {
    child: Child,
    hands: Hands,
    /// It has said something.
    works: bool,
}

/// What a consumer has claimed and not acked.
#[derive(Default)]
struct Hands {
    item: Option<String>,
    /// That it keeps.
    holds: bool,
}

impl Worker {
    fn new(child: Child) -> Self {
        Self { child, hands: Hands::default(), works: false }
    }
}

impl Story {
    fn hear(&mut self, worker: &mut Worker) {
        let said = worker.child.said();
        worker.works |= !said.is_empty();
        self.note(worker.child.id(), &mut worker.hands, &said);
    }

    fn note(&mut self, id: u32, hands: &mut Hands, said: &[String]) {
        for line in said {
            self.log.push((Instant::now(), format!("{id} {line}")));
            let (what, item) = line.split_once(' ').expect("two words");
            if what == "acked" {
                hands.item = None;
                *self.acked.entry(item.to_owned()).or_default() += 1;
                continue;
            }
            *hands = Hands { item: Some(item.to_owned()), holds: what == "holds" };
            if let Some(orphan) = self.orphans.remove(item) {
                let since = self.etcd_started.map_or(orphan.since, |started| started.max(orphan.since));
                self.slowest = self.slowest.max(since.elapsed());
                let others = self.delivered_after(since + REDELIVERY + LOAD);
                if others > OTHERS {
                    self.passed_over.push(self.of(item, others));
                }
                self.redelivered += usize::from(orphan.held);
            }
        }
    }

    /// How many items were delivered since then.
    fn delivered_after(&self, since: Instant) -> usize {
        let later = self.log.iter().rev().take_while(|(at, _)| *at > since);
        later.filter(|(_, said)| said.contains(" claimed ") || said.contains(" holds ")).count()
    }

    /// What was said of an item, and how long ago.
    fn of(&self, item: &str, others: usize) -> String {
        let of = |said: &&(Instant, String)| said.1.ends_with(&format!(" {item}"));
        let tell = |(at, said): &(Instant, String)| format!("{:.1?} ago: {said}\n", at.elapsed());
        let said: String = self.log.iter().filter(of).map(tell).collect();
        format!("{others} others were delivered before {item}:\n{said}")
    }

    /// Kills a consumer. What it said last is heard: it may have had an orphan, which now is its own.
    async fn kill(&mut self, worker: Worker) {
        let Worker { child, mut hands, .. } = worker;
        let id = child.id();
        self.note(id, &mut hands, &child.kill().await);
        self.died += usize::from(hands.holds);
        let orphan = Orphan { since: Instant::now(), held: hands.holds };
        if let Some(item) = hands.item {
            self.log.push((Instant::now(), format!("{id} was killed with {item}")));
            self.orphans.insert(item, orphan);
        }
    }
}

#[tokio::test]
async fn nothing_is_lost_or_acked_twice_whatever_happens() {
    if lacking(Needs::Disk) {
        return;
    }
    let items = rounds(3_000, 100_000);
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let mut producers = tokio::task::JoinSet::new();
        // Whoever takes the place of a dead consumer lists what is there; that is not to be all there is to see.
        let waiting = Arc::new(Semaphore::new(WAITING));
        for producer in 0..PRODUCERS {
            let (endpoint, name) = (scope.endpoint().to_owned(), scope.name().to_owned());
            let waiting = waiting.clone();
            producers.spawn(async move {
                let (_faults, session) = unreliable(&endpoint).await;
                let queue = Queue::new(&session, name).unwrap();
                let mut put = Vec::new();
                for item in (0..items / PRODUCERS).map(|n| format!("{producer}-{n}")) {
                    waiting.acquire().await.unwrap().forget();
                    // Unknown is unknown: such an item may be there or not.
                    if queue.enqueue(item.as_str()).await.is_ok() {
                        put.push(item);
                    }
                }
                drop(queue);
                session.close().await.unwrap();
                put
            });
        }
        let mut story = Story::default();
        let new_worker = || Worker::new(start(scope, "work"));
        let mut workers: Vec<Worker> = (0..CONSUMERS).map(|_| new_worker()).collect();
        let (mut killed, mut doomed, mut restarts, mut acked) = (Instant::now(), 0, 0, 0);
        let limit =
            Instant::now() + if full() { Duration::from_secs(3600) } else { Duration::from_secs(240) };
        loop {
            tokio::time::sleep(Duration::from_millis(20)).await;
            workers.iter_mut().for_each(|worker| story.hear(worker));
            waiting.add_permits(story.acked.len() - acked);
            acked = story.acked.len();
            while let Some(ended) = producers.try_join_next() {
                story.put.extend(ended.unwrap());
            }
            for worker in &mut workers {
                if worker.hands.holds {
                    story.kill(std::mem::replace(worker, new_worker())).await;
                }
            }
            // Whatever it is about; but under load most would be killed before they begin, and nobody would work at all.
            let any = &mut workers[fastrand::usize(..CONSUMERS)];
            if any.works && killed.elapsed() > Duration::from_secs(1) {
                killed = Instant::now();
                story.kill(std::mem::replace(any, new_worker())).await;
            }
            if story.acked.len() * ROUNDS / items > doomed {
                doomed += 1;
                workers[doomed % CONSUMERS].child.tell("hold");
            }
            let part = story.acked.len() * 3 / items;
            if part > restarts && restarts < 2 {
                restarts += 1;
                server.kill();
                server.launch();
                server.ready().await;
                story.etcd_started = Some(Instant::now());
            }
            assert!(Instant::now() < limit, "{} of {items} acked", story.acked.len());
            if producers.is_empty() && scope.keys().await.is_empty() {
                break;
            }
        }
        eventually(PATIENCE, "what the dead held is delivered again", async || {
            workers.iter_mut().for_each(|worker| story.hear(worker));
            story.redelivered == story.died
        })
        .await;
        for mut worker in workers {
            story.hear(&mut worker);
            worker.child.tell("end");
            worker.child.wait().await;
        }
        tell(scope, &story, items, restarts).await;
    })
    .await;
}

/// Checks the story against what is at etcd.
async fn tell(scope: &Scope, story: &Story, items: usize, restarts: usize) {
    let twice: Vec<_> = story.acked.iter().filter(|(_, times)| **times > 1).collect();
    assert!(twice.is_empty(), "acked twice: {twice:?}");
    let mut written = BTreeMap::new();
    let prefix = done_key(scope.name(), "");
    // Each producer's by itself: a plain client takes 4 MiB in an answer.
    for producer in 0..PRODUCERS {
        let options = GetOptions::new().with_prefix().with_keys_only();
        let found = scope.client().get(format!("{prefix}{producer}-"), Some(options)).await.unwrap();
        for kv in found.kvs() {
            written.insert(text(kv.key())[prefix.len()..].to_owned(), kv.version());
        }
    }
    let doubled: Vec<_> = written.iter().filter(|(_, version)| **version != 1).collect();
    assert!(doubled.is_empty(), "written more than once: {doubled:?}");
    // A consumer that was killed after a plain ack could not say so.
    let done = |item: &&String| item.ends_with('0') || written.contains_key(*item);
    let lost: Vec<_> = story.put.iter().filter(|item| !done(item)).collect();
    eprintln!(
        "{} of {items} put for sure, {} acked, {} written, {restarts} restarts, {} died with an item, slowest \
         redelivery {:?}",
        story.put.len(),
        story.acked.len(),
        written.len(),
        story.died,
        story.slowest
    );
    assert!(lost.is_empty(), "lost: {lost:?}");
    assert!(story.put.len() > items * 9 / 10, "the producers put only {}", story.put.len());
    assert!(story.died >= ROUNDS / 2, "only {} died with an item", story.died);
    assert!(story.passed_over.is_empty(), "redelivered late:\n{}", story.passed_over.join("\n"));
    let options = etcd_client::DeleteOptions::new().with_prefix();
    scope.client().delete(prefix, Some(options)).await.unwrap();
}
