//! Entering, leaving and proclaiming, many times over, with a request whose answer is lost, that is late, or that is
//! sent twice. Each ends by showing that the line is empty and that the next lock is taken at once.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use etcd_recipes::{Election, Leadership, MutexGuard, Result, Session};
use futures::StreamExt as _;

use super::{LONG, PATIENCE, Rig, TTL, arrive, assert_holds};
use crate::support::check::{Scope, eventually, scoped};
use crate::support::faults::{Fault, Injection, Until};
use crate::support::line::text;
use crate::support::rounds;

/// The time after which an impatient caller goes away; shorter than what the session waits for an answer.
const IMPATIENCE: Duration = Duration::from_secs(1);
/// Most of the time the next one has the lock within this time.
const AT_ONCE: Duration = Duration::from_secs(2);

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// It is committed; the answer is an error.
    AnswerLost,
    /// It is committed; there is no answer.
    NoAnswer,
    /// It is late, and the call is cancelled.
    LateAndCancelled,
    /// It is late, and sent again.
    LateAndResent,
    /// It arrives a second time, late.
    Twice,
}

const WAYS: [Way; 5] =
    [Way::AnswerLost, Way::NoAnswer, Way::LateAndCancelled, Way::LateAndResent, Way::Twice];

impl Way {
    fn fault(self) -> Fault {
        match self {
            Self::AnswerLost => Fault::LoseAnswer,
            Self::NoAnswer => Fault::NeverAnswer,
            Self::LateAndCancelled | Self::LateAndResent => Fault::Hold(Until::Released),
            Self::Twice => Fault::Twice(Until::Released),
        }
    }

    /// Calls, with the next transaction of the rig's line meeting its fate. `None` if the call was cancelled.
    async fn befalls<T>(
        self,
        rig: &Rig<'_>,
        call: impl Future<Output = Result<T>>,
    ) -> (Option<T>, Injection) {
        let met = rig.txns().inject(self.fault());
        let done = if self == Self::LateAndCancelled {
            let done = tokio::time::timeout(IMPATIENCE, call).await;
            assert!(done.is_err(), "the request was not held back");
            None
        } else {
            Some(call.await.unwrap())
        };
        assert_eq!(met.hits(), 1);
        (done, met)
    }
}

/// One run of a test: a contender whose request meets its fate, and one that nothing happens to.
struct Run<'a> {
    rig: Rig<'a>,
    other: Session,
    way: Way,
    /// Every second one has its late copy arrive later than the others.
    later: bool,
    /// How long others waited for their turn.
    waits: Arc<Mutex<Vec<Duration>>>,
}

/// Runs `each` in every way, 100 times in full.
async fn in_every_way<'a>(scope: &'a Scope, each: impl AsyncFn(&Run<'a>)) {
    let other = Session::builder_with_client(scope.client()).ttl(TTL).connect().await.unwrap();
    scope.owns_lease(other.lease_id().unwrap());
    let times = rounds(12, 100);
    let waits = Arc::new(Mutex::new(Vec::new()));
    let runs = (0..times).flat_map(|number| WAYS.map(|way| (number, way)));
    let runs = futures::stream::iter(runs).map(|(number, way)| {
        let (each, other, waits) = (&each, other.clone(), waits.clone());
        async move {
            let rig = Rig::new(scope, &format!("{way:?}-{number}")).await;
            let run = Run { rig, other, way, later: number % 2 == 1, waits };
            tokio::time::timeout(LONG, each(&run)).await.unwrap_or_else(|_| panic!("{way:?}: stuck"));
            assert!(run.rig.line().await.is_empty(), "{way:?}");
            run.rig.close().await;
        }
    });
    runs.buffer_unordered(30).collect::<()>().await;
    let mut waits = std::mem::take(&mut *waits.lock().unwrap());
    waits.sort_unstable();
    let median = waits.get(waits.len() / 2);
    assert!(median.is_none_or(|median| *median < AT_ONCE), "others wait {median:?} for their turn");
    other.close().await.unwrap();
}

impl Run<'_> {
    fn other_mutex(&self) -> etcd_recipes::Mutex {
        etcd_recipes::Mutex::new(&self.other, &self.rig.name).unwrap()
    }

    fn other_election(&self) -> Election {
        Election::new(&self.other, &self.rig.name).unwrap()
    }

    /// The other contender has its turn at once: nothing is stuck. Returns its token.
    async fn other_passes(&self) -> i64 {
        let (mutex, start) = (self.other_mutex(), Instant::now());
        let guard = tokio::time::timeout(PATIENCE, mutex.lock()).await;
        let guard = guard.unwrap_or_else(|_| panic!("{:?}: stuck", self.way)).unwrap();
        self.waits.lock().unwrap().push(start.elapsed());
        let token = guard.token();
        guard.unlock().await.unwrap();
        token
    }

    /// The late copy arrives, if there is one.
    async fn late_copy_arrives(&self, met: &Injection) {
        if !matches!(self.way, Way::AnswerLost | Way::NoAnswer) {
            arrive(met).await;
        }
    }

    /// The lock was taken once, and only by this one.
    async fn assert_locked(&self, guard: &MutexGuard, after: i64) {
        assert!(guard.token() > after, "{:?}: the token did not grow", self.way);
        assert_holds(&self.rig, guard).await;
        assert!(self.other_mutex().try_lock().await.unwrap().is_none(), "{:?}: held twice", self.way);
    }

    async fn acquire(&self, call: impl AsyncFn(&etcd_recipes::Mutex) -> Result<MutexGuard>) {
        let mutex = self.rig.mutex();
        let mut token = self.other_passes().await;
        let (guard, met) = self.way.befalls(&self.rig, call(&mutex)).await;
        if let Some(guard) = guard {
            self.assert_locked(&guard, token).await;
            token = guard.token();
            if !self.later {
                self.late_copy_arrives(&met).await;
                self.assert_locked(&guard, token - 1).await;
            }
            guard.unlock().await.unwrap();
            assert!(self.rig.line().await.is_empty(), "{:?}", self.way);
        }
        let next = self.other_passes().await;
        assert!(next > token, "{:?}: the token did not grow", self.way);
        self.late_copy_arrives(&met).await;
        self.stays_free().await;
        assert!(self.rig.pass().await > next, "{:?}: the token did not grow", self.way);
    }

    /// The line becomes empty in time.
    async fn becomes_free(&self) {
        let what = format!("{:?}: the line is empty", self.way);
        eventually(PATIENCE, &what, async || self.rig.line().await.is_empty()).await;
    }

    /// The late copy has left nothing behind.
    async fn stays_free(&self) {
        if self.way == Way::LateAndCancelled {
            // The copy may have come before the session had given the call up; then it is taken back.
            self.becomes_free().await;
        } else {
            assert!(self.rig.line().await.is_empty(), "{:?}: it reappeared", self.way);
        }
    }

    async fn release(&self) {
        let guard = self.rig.mutex().lock().await.unwrap();
        let token = guard.token();
        let (done, met) = self.way.befalls(&self.rig, guard.unlock()).await;
        if done.is_some() {
            assert!(self.rig.line().await.is_empty(), "{:?}", self.way);
        }
        let next = self.other_passes().await;
        assert!(next > token, "{:?}: the token did not grow", self.way);
        let guard = self.rig.mutex().lock().await.unwrap();
        self.assert_locked(&guard, next).await;
        if !self.later {
            self.late_copy_arrives(&met).await;
            self.assert_locked(&guard, next).await;
        }
        guard.unlock().await.unwrap();
        self.late_copy_arrives(&met).await;
    }

    /// It leads alone and shows this value.
    async fn assert_leads(&self, leadership: &Leadership, value: &str) {
        let line = self.rig.line().await;
        let found: Vec<_> = line.iter().map(|entry| (entry.key.clone(), entry.value.as_str())).collect();
        assert_eq!(found, [(text(leadership.key()), value)], "{:?}", self.way);
        assert!(leadership.is_held());
        let leader = self.other_election().leader().await.unwrap().expect("nobody leads");
        assert_eq!((text(&leader.key), text(&leader.value)), (text(leadership.key()), value.to_owned()));
    }

    async fn campaign(&self) {
        let election = self.rig.election();
        let mut token = self.other_passes().await;
        let (leadership, met) = self.way.befalls(&self.rig, election.campaign("first")).await;
        if let Some(leadership) = leadership {
            assert!(leadership.token() > token);
            token = leadership.token();
            self.assert_leads(&leadership, "first").await;
            leadership.proclaim("second").await.unwrap();
            if !self.later {
                self.late_copy_arrives(&met).await;
            }
            self.assert_leads(&leadership, "second").await;
            leadership.resign().await.unwrap();
            assert!(self.rig.line().await.is_empty(), "{:?}", self.way);
        }
        let next = self.other_passes().await;
        assert!(next > token, "{:?}: the token did not grow", self.way);
        self.late_copy_arrives(&met).await;
        self.stays_free().await;
        assert_eq!(self.other_election().leader().await.unwrap(), None, "{:?}", self.way);
        assert!(self.rig.pass().await > next, "{:?}: the token did not grow", self.way);
    }

    async fn proclaim(&self) {
        let election = self.rig.election();
        let leadership = election.campaign("first").await.unwrap();
        let (done, met) = self.way.befalls(&self.rig, leadership.proclaim("second")).await;
        if done.is_some() {
            self.assert_leads(&leadership, "second").await;
        }
        leadership.proclaim("third").await.unwrap();
        self.assert_leads(&leadership, "third").await;
        if !self.later {
            self.late_copy_arrives(&met).await;
            self.assert_leads(&leadership, "third").await;
        }
        leadership.resign().await.unwrap();
        let leadership = election.campaign("again").await.unwrap();
        self.late_copy_arrives(&met).await;
        self.assert_leads(&leadership, "again").await;
        leadership.resign().await.unwrap();
    }

    async fn resign(&self) {
        let election = self.rig.election();
        let leadership = election.campaign("first").await.unwrap();
        let token = leadership.token();
        let (done, met) = self.way.befalls(&self.rig, leadership.resign()).await;
        if done.is_none() {
            self.becomes_free().await;
        }
        assert_eq!(self.other_election().leader().await.unwrap(), None, "{:?}", self.way);
        let next = self.other_passes().await;
        assert!(next > token, "{:?}: the token did not grow", self.way);
        let leadership = election.campaign("again").await.unwrap();
        assert!(leadership.token() > next);
        if !self.later {
            self.late_copy_arrives(&met).await;
        }
        self.assert_leads(&leadership, "again").await;
        leadership.resign().await.unwrap();
        self.late_copy_arrives(&met).await;
    }
}

#[tokio::test]
async fn lock_is_taken_once_or_not_at_all() {
    scoped(async |scope| {
        in_every_way(scope, async |run| run.acquire(async |mutex| mutex.lock().await).await).await;
    })
    .await;
}

#[tokio::test]
async fn try_lock_takes_the_lock_once_or_not_at_all() {
    scoped(async |scope| {
        let call =
            async |mutex: &etcd_recipes::Mutex| Ok(mutex.try_lock().await?.expect("nobody else is there"));
        in_every_way(scope, async |run| run.acquire(call).await).await;
    })
    .await;
}

#[tokio::test]
async fn unlock_releases_this_hold_and_no_other() {
    scoped(async |scope| in_every_way(scope, Run::release).await).await;
}

#[tokio::test]
async fn campaign_leads_once_or_not_at_all() {
    scoped(async |scope| in_every_way(scope, Run::campaign).await).await;
}

#[tokio::test]
async fn proclaim_shows_the_last_value() {
    scoped(async |scope| in_every_way(scope, Run::proclaim).await).await;
}

#[tokio::test]
async fn resign_ends_this_leadership_and_no_other() {
    scoped(async |scope| in_every_way(scope, Run::resign).await).await;
}
