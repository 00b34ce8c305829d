//! Who is there: the instances of a service, kept up to date.

mod follow;
mod snapshot;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use futures::stream::{BoxStream, StreamExt};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use self::follow::{Follower, Protection};
pub use self::snapshot::{Change, Malformed, Snapshot};
use super::registration::usable;
use super::{FormatError, Instance, Services};
use crate::error::{Error, Result};
use crate::name;
use crate::session::Session;
#[cfg(feature = "tonic")]
use crate::session::runtime::Runtime;
use crate::session::view::{Freshness, Values, View};

/// The options of a [`Discovery`]; see [`Services::discover`].
#[must_use = "a builder does nothing until `open` is called"]
#[derive(Debug, Clone)]
pub struct DiscoveryBuilder {
    services: Services,
    service: String,
    filter: Filter,
    protection: Option<Protection>,
}

/// Which instances are wanted.
#[derive(Debug, Clone, Default)]
struct Filter {
    version: Option<String>,
    tags: Vec<String>,
}

impl Filter {
    fn wants(&self, instance: &Instance) -> bool {
        self.version.as_ref().is_none_or(|version| *version == instance.version)
            && self.tags.iter().all(|tag| instance.tags.contains(tag))
    }
}

impl DiscoveryBuilder {
    pub(super) fn new(services: &Services, service: String) -> Self {
        Self { services: services.clone(), service, filter: Filter::default(), protection: None }
    }

    /// Leaves out instances of other versions.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.filter.version = Some(version.into());
        self
    }

    /// Leaves out instances without this tag. With several, they must have all.
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.filter.tags.push(tag.into());
        self
    }

    /// Keeps those who vanish while too many do: when more than `share` of the instances have gone within the time
    /// `keep`, it is rather their registration that failed than they. They stay in the list until that time is over or
    /// others have come. Off by default.
    ///
    /// `share` is between 0 and 1. A list never becomes empty at once then, whatever the share.
    pub fn protect(mut self, share: f64, keep: Duration) -> Self {
        self.protection = Some(Protection { share, keep });
        self
    }

    /// Lists the instances and follows them from then on. Waits for etcd.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidInstance`] when the format has no place for the name; [`Error::InvalidOption`] for a share out of
    /// its range; [`Error::PermissionDenied`]; [`Error::Closed`].
    ///
    /// # Cancel safety
    ///
    /// Only reads.
    pub async fn open(self) -> Result<Discovery> {
        let Self { services: Services { session, format }, service, filter, protection } = self;
        if protection.is_some_and(|protection| !(0.0..=1.0).contains(&protection.share)) {
            let reason = "the share is not between 0 and 1".into();
            return Err(Error::InvalidOption { option: "protect", reason });
        }
        let refuse = |error: FormatError| Error::InvalidInstance {
            what: name::display(service.as_bytes()),
            reason: error.to_string(),
        };
        let prefix = usable(&session, &format.prefix(&service).map_err(refuse)?)?;
        let core = session.core().clone();
        let view = View::open(core.clone(), prefix, Values::Keep).await?;
        let freshness = view.freshness();
        let (follower, snapshots) = Follower::new(view, format, service.clone(), filter, protection);
        let runtime = core.runtime.clone();
        let task = core.runtime.spawn_abortable(follower.run(runtime, core.closing.clone()));
        let shared = Shared { snapshots, freshness, service, task, session };
        Ok(Discovery { shared: Arc::new(shared) })
    }
}

/// The instances of a service, kept up to date. Cheap to clone.
///
/// While etcd cannot be reached the last known list stays; [`stale_for`](Discovery::stale_for) tells. One entry that
/// cannot be read affects that entry alone: its instance keeps its last good state, and [`Snapshot::malformed`] and
/// [`changes`](Discovery::changes) report it.
///
/// It ends with its last handle; a handle keeps the session open.
#[derive(Clone)]
pub struct Discovery {
    shared: Arc<Shared>,
}

struct Shared {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    freshness: Freshness,
    service: String,
    task: AbortHandle,
    /// A handle keeps it open.
    #[cfg_attr(not(feature = "tonic"), expect(dead_code))]
    session: Session,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Discovery {
    /// The service.
    pub fn service(&self) -> &str {
        &self.shared.service
    }

    /// The tasks of its connections run where those of its session do.
    #[cfg(feature = "tonic")]
    pub(super) fn runtime(&self) -> &Runtime {
        &self.shared.session.core().runtime
    }

    /// Who is there now, as far as is known. Local; takes no time.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.snapshots.borrow().clone()
    }

    /// For how long changes may have been missed, because etcd could not be reached; `None` while the list is kept up to
    /// date.
    pub fn stale_for(&self) -> Option<Duration> {
        self.shared.freshness.stale_for()
    }

    /// Waits until there is an instance.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`].
    ///
    /// # Cancel safety
    ///
    /// Only waits.
    pub async fn ready(&self) -> Result<()> {
        let mut snapshots = self.shared.snapshots.clone();
        let ready = snapshots.wait_for(|snapshot| !snapshot.instances.is_empty()).await;
        ready.map(|_| ()).map_err(|_| Error::Closed)
    }

    /// What changes: first everybody who is there, then everybody who comes, changes or goes.
    ///
    /// A reader that is slow misses states in between, never the last. Ends when the session is closed.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(discovery: etcd_recipes::service::Discovery) {
    /// use etcd_recipes::service::Change;
    /// use futures::StreamExt;
    ///
    /// let mut changes = discovery.changes();
    /// while let Some(change) = changes.next().await {
    ///     match change {
    ///         Change::Added(instance) => println!("{} has come", instance.address),
    ///         Change::Removed(instance) => println!("{} has gone", instance.address),
    ///         other => println!("{other:?}"),
    ///     }
    /// }
    /// # }
    /// ```
    pub fn changes(&self) -> Changes {
        let snapshots = self.shared.snapshots.clone();
        let start = (self.clone(), snapshots, Arc::new(Snapshot::default()), true);
        let changes = futures::stream::unfold(start, |(discovery, mut snapshots, seen, first)| async move {
            if !first && snapshots.changed().await.is_err() {
                return None;
            }
            let now = snapshots.borrow_and_update().clone();
            let changes = snapshot::differences(&seen, &now);
            Some((futures::stream::iter(changes), (discovery, snapshots, now, false)))
        });
        Changes { changes: changes.flatten().boxed() }
    }
}

impl std::fmt::Debug for Discovery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Discovery")
            .field("service", &self.shared.service)
            .field("snapshot", &self.snapshot())
            .field("stale_for", &self.stale_for())
            .finish_non_exhaustive()
    }
}

/// The stream of [`Discovery::changes`].
#[must_use = "a stream does nothing unless polled"]
pub struct Changes {
    changes: BoxStream<'static, Change>,
}

impl Stream for Changes {
    type Item = Change;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.changes.poll_next_unpin(cx)
    }
}

impl std::fmt::Debug for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Changes").finish_non_exhaustive()
    }
}
