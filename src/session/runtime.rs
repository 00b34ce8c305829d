//! The seam to the outside: the clock that decides about leases, randomness and tasks. Nothing else in the crate draws a
//! random number or spawns. Timers are tokio's.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};

use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio_util::task::TaskTracker;

/// A point in time, in nanoseconds of a clock that on Linux also runs while the machine sleeps. Never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Time(pub(crate) u64);

impl Time {
    pub(crate) fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanos(duration)))
    }

    pub(crate) fn until(self, later: Self) -> Duration {
        Duration::from_nanos(later.0.saturating_sub(self.0))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The runtime of one session.
#[derive(Debug)]
pub(crate) struct Runtime {
    handle: Handle,
    tasks: TaskTracker,
    random: Mutex<fastrand::Rng>,
    /// Where tokio's clock decides: when it began, and what the clock on the wall showed then.
    #[cfg(feature = "embedded")]
    began: Option<Began>,
}

/// The beginning of virtual time, by tokio's clock and by that on the wall.
#[cfg(feature = "embedded")]
pub(crate) type Began = (tokio::time::Instant, SystemTime);

impl Runtime {
    /// The tokio runtime of the caller.
    pub(crate) fn current() -> Self {
        // Lease ids and nonces must differ between processes that start together: the seed comes from the system.
        let seed = uuid::Uuid::new_v4().as_u64_pair().0;
        Self {
            handle: Handle::current(),
            tasks: TaskTracker::new(),
            random: Mutex::new(fastrand::Rng::with_seed(seed)),
            #[cfg(feature = "embedded")]
            began: None,
        }
    }

    /// Another, with tasks of its own and the same clock. Its randomness follows from that of this one.
    pub(crate) fn beside(&self) -> Self {
        Self {
            handle: self.handle.clone(),
            tasks: TaskTracker::new(),
            random: Mutex::new(fastrand::Rng::with_seed(self.random())),
            #[cfg(feature = "embedded")]
            began: self.began,
        }
    }

    /// The same, with tokio's clock for the deadlines of leases and in place of the one on the wall.
    #[cfg(feature = "embedded")]
    pub(crate) fn virtual_time(began: Began) -> Self {
        Self { began: Some(began), ..Self::current() }
    }

    /// The same, with randomness and a clock on the wall that are alike in every run.
    #[cfg(feature = "embedded")]
    pub(crate) fn seeded(self, seed: u64) -> Self {
        let began = self.began.map_or_else(tokio::time::Instant::now, |(began, _)| began);
        let began = Some((began, SystemTime::UNIX_EPOCH + Duration::from_secs(1_600_000_000)));
        Self { began, random: Mutex::new(fastrand::Rng::with_seed(seed)), ..self }
    }

    /// The time now. One system call without a lock: fit for the hottest path.
    pub(crate) fn now(&self) -> Time {
        #[cfg(feature = "embedded")]
        if let Some((began, _)) = self.began {
            return Time(nanos(began.elapsed()).saturating_add(1));
        }
        Time(clock().max(1))
    }

    /// The time on the wall, for what other machines are told. Decides about nothing that must be right.
    pub(crate) fn wall(&self) -> SystemTime {
        #[cfg(feature = "embedded")]
        if let Some((began, wall)) = self.began {
            return wall + began.elapsed();
        }
        SystemTime::now()
    }

    /// The same, in seconds since 1970.
    pub(crate) fn wall_seconds(&self) -> u64 {
        self.wall().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs())
    }

    /// Sleeps until `time`, also when the clock of the timers stands still while the machine sleeps.
    pub(crate) async fn sleep_until(&self, time: Time) {
        loop {
            let now = self.now();
            if now >= time {
                return;
            }
            tokio::time::sleep(now.until(time).min(Duration::from_secs(60))).await;
        }
    }

    /// Runs `work` to its end, whatever becomes of the caller. Works from any thread; after the runtime's end the work
    /// is dropped.
    pub(crate) fn spawn<F>(&self, work: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        // Boxed, because a task is moved about while it is made, and most of this crate's are large.
        self.tasks.spawn_on(Box::pin(work), &self.handle);
    }

    /// The same, for work that may be given up at any time.
    pub(crate) fn spawn_abortable<F>(&self, work: F) -> AbortHandle
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tasks.spawn_on(Box::pin(work), &self.handle).abort_handle()
    }

    /// Runs the task of a connection, or of an attempt to make one. It ends with the last client that has it: nobody waits
    /// for that.
    pub(crate) fn spawn_connection<F>(&self, connection: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.handle.spawn(connection);
    }

    /// The first step of work that is to be spawned. Only where tasks run: its timers belong to the runtime it begins in,
    /// which may end before.
    pub(crate) fn begin<T>(&self, work: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        match Handle::try_current() {
            Ok(current) if current.id() == self.handle.id() => {
                work.poll(&mut Context::from_waker(Waker::noop()))
            }
            _ => Poll::Pending,
        }
    }

    /// Runs code that may block, on a thread for that. `None` if the runtime ends.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        self.handle.spawn_blocking(work).await.ok()
    }

    /// Waits until every task has ended. New ones may still be spawned.
    pub(crate) async fn idle(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    pub(crate) fn random(&self) -> u64 {
        self.random.lock().unwrap_or_else(PoisonError::into_inner).u64(..)
    }

    /// A random duration between zero and `most`.
    pub(crate) fn jitter(&self, most: Duration) -> Duration {
        let most = nanos(most);
        Duration::from_nanos(self.random.lock().unwrap_or_else(PoisonError::into_inner).u64(..=most))
    }
}

/// Waits between attempts: exponential with full jitter, capped.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
    most: Duration,
}

impl Backoff {
    pub(crate) const fn new(first: Duration, most: Duration) -> Self {
        Self { next: first, most }
    }

    /// The backoff of requests that are sent again: from 10 ms to 250 ms.
    pub(crate) const fn of_requests() -> Self {
        Self::new(Duration::from_millis(10), Duration::from_millis(250))
    }

    /// The backoff of writes that etcd refuses for now: from 100 ms to 1.5 s.
    pub(crate) const fn of_refusals() -> Self {
        Self::new(Duration::from_millis(100), Duration::from_millis(1500))
    }

    /// How long to wait now.
    pub(crate) fn pause(&mut self, runtime: &Runtime) -> Duration {
        // A floor of a tenth: full jitter alone may draw a row of near-zero waits, which is a hot loop.
        let pause = self.next / 10 + runtime.jitter(self.next);
        self.next = (self.next * 2).min(self.most);
        pause
    }

    pub(crate) async fn wait(&mut self, runtime: &Runtime) {
        tokio::time::sleep(self.pause(runtime)).await;
    }
}

#[cfg(target_os = "linux")]
fn clock() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(not(target_os = "linux"))]
fn clock() -> u64 {
    use std::{sync::OnceLock, time::Instant};
    static START: OnceLock<Instant> = OnceLock::new();
    nanos(START.get_or_init(Instant::now).elapsed())
}
