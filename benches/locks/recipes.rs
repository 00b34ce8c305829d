//! The workloads of the library: sessions, locks, elections.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use etcd_recipes::{Election, Leadership, Mutex, MutexGuard, Session, SessionBuilder};

use crate::common::crew::{Contender, Crew, take_turns};
use crate::common::line::Line;
use crate::common::{fresh, open};
use crate::load::Load;

pub(crate) const PEER: &str = "etcd-recipes";

/// A session with the TTL of the load.
pub(crate) async fn begin(builder: SessionBuilder, load: &Load) -> Result<Session> {
    Ok(builder.ttl(Duration::from_secs(load.ttl)).connect().await?)
}

/// The sessions of `n` contenders, as the mode says.
pub(crate) async fn sessions(load: &Load) -> Result<Vec<Session>> {
    let own = || begin(Session::builder([&load.endpoint]), load);
    match load.mode.as_str() {
        "one" => Ok(vec![own().await?; load.n]),
        "" => open(load.n, |_| own()).await,
        _ => {
            let clients = load.clients().await?;
            open(load.n, |i| begin(Session::builder_with_client(clients[i].clone()), load)).await
        }
    }
}

pub(crate) async fn close(sessions: &[Session]) -> Result<()> {
    open(sessions.len(), async |i| Ok(sessions[i].close().await?)).await.map(|_| ())
}

/// A session is taken and closed, by `n` at once on one connection.
pub(crate) async fn session_rate(load: &Load) -> Result<Line> {
    let client = load.connect().await?;
    let mut crew = Crew::default();
    for _ in 0..load.n {
        let (client, load) = (client.clone(), load.clone());
        crew.spawn(|mut recorder| async move {
            while recorder.working() {
                let start = Instant::now();
                begin(Session::builder_with_client(client.clone()), &load).await?.close().await?;
                recorder.done(Some(start.elapsed()));
            }
            Ok(recorder)
        });
    }
    crew.measure(PEER, load.run()).await
}

/// `n` tasks lock and unlock, each its own name, all on one connection, and unless the mode says otherwise each with its
/// own session.
pub(crate) async fn mutex_uncontended(load: &Load) -> Result<Line> {
    let sessions = if load.mode.is_empty() { beside(load).await? } else { sessions(load).await? };
    let mut crew = Crew::default();
    for session in &sessions {
        let mutex = Mutex::new(session, fresh("lock"))?;
        crew.spawn(|mut recorder| async move {
            while recorder.working() {
                let start = Instant::now();
                mutex.lock().await?.unlock().await?;
                recorder.done(Some(start.elapsed()));
            }
            Ok(recorder)
        });
    }
    let line = crew.measure(PEER, load.run()).await?;
    close(&sessions).await?;
    Ok(line)
}

/// `n` sessions beside each other.
async fn beside(load: &Load) -> Result<Vec<Session>> {
    let first = begin(Session::builder([&load.endpoint]), load).await?;
    let mut sessions = open(load.n.saturating_sub(1), async |_| Ok(first.beside().await?)).await?;
    sessions.push(first);
    Ok(sessions)
}

/// `n` waiters on one name.
pub(crate) async fn mutex_contended(load: &Load) -> Result<Line> {
    let (sessions, name) = (sessions(load).await?, fresh("lock"));
    let newest = Arc::new(AtomicI64::new(0));
    let locker = |session| Ok(Locker { mutex: Mutex::new(session, &name)?, newest: newest.clone() });
    let lockers = sessions.iter().map(locker).collect::<Result<_>>()?;
    let line = take_turns(PEER, load.run(), load.own.hold, lockers).await?;
    close(&sessions).await?;
    Ok(line)
}

/// `n` candidates; the winner resigns at once.
pub(crate) async fn election(load: &Load) -> Result<Line> {
    let (sessions, name) = (sessions(load).await?, fresh("election"));
    let candidate = |(i, session)| {
        Ok(Candidate { election: Election::new(session, &name)?, value: format!("candidate-{i}") })
    };
    let candidates = sessions.iter().enumerate().map(candidate).collect::<Result<_>>()?;
    let line = take_turns(PEER, load.run(), load.own.hold, candidates).await?;
    close(&sessions).await?;
    Ok(line)
}

struct Locker {
    mutex: Mutex,
    /// The largest token that any of them has had.
    newest: Arc<AtomicI64>,
}

impl Contender for Locker {
    type Hold = MutexGuard;

    async fn acquire(&mut self) -> Result<MutexGuard> {
        let guard = self.mutex.lock().await?;
        let before = self.newest.fetch_max(guard.token(), Ordering::SeqCst);
        ensure!(before < guard.token(), "token {} came after {before}", guard.token());
        Ok(guard)
    }

    async fn release(&mut self, guard: MutexGuard) -> Result<()> {
        Ok(guard.unlock().await?)
    }
}

struct Candidate {
    election: Election,
    value: String,
}

impl Contender for Candidate {
    type Hold = Leadership;

    async fn acquire(&mut self) -> Result<Leadership> {
        Ok(self.election.campaign(self.value.as_str()).await?)
    }

    async fn release(&mut self, leadership: Leadership) -> Result<()> {
        Ok(leadership.resign().await?)
    }
}
