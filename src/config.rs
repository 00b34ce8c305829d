//! A prefix kept in memory: reads cost nanoseconds, and every change is told.
//!
//! A [`ConfigCache`] lists a prefix once, and from then on follows it: in the order of commit, without gaps, one revision
//! at a time and as a whole. Reads are answered from memory, without a lock, as bytes or as a type of the caller's.
//!
//! # When etcd is away
//!
//! The last known values stay readable, and [`ConfigCache::stale_since`] tells that they may be old. Nothing that goes
//! wrong ever empties the cache. When etcd is back the cache goes on where it was. If the changes in between are lost
//! (compacted meanwhile, or etcd was restored from a backup), it lists the prefix again and tells what is different, deletions
//! included; then revisions may be skipped, and after a restored backup they may be lower than before.
//!
//! # Who is told, and how
//!
//! | You want | Take |
//! |---|---|
//! | code that runs at each change | [`ConfigCache::on_key`], [`ConfigCache::on_prefix`] |
//! | to await changes one by one | [`ConfigCache::changes`] |
//! | only the newest value of one key | [`ConfigCache::watch`], [`ConfigCache::watch_as`] |
//!
//! All of them begin with what is there already, so that nothing lies between a read and the first change. Whoever is
//! slow delays nobody else: when many changes wait for one reader, those of one key are joined into one, from the
//! state it saw last to the newest.

mod cache;
mod changes;
mod followers;
mod map;
mod publish;
mod state;
mod typed;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use tokio::sync::watch as channel;
use tokio_util::sync::{CancellationToken, DropGuard};

use self::cache::Cache;
use self::changes::Pattern;
pub use self::changes::{ConfigChange, ConfigChanges};
use self::followers::BoxError;
pub use self::followers::{ConfigHandler, ConfigProblem};
pub use self::state::{ConfigEntry, ConfigSnapshot};
pub use self::typed::BadValue;
use crate::error::{Error, Result};
use crate::name::{self, Prefix};
use crate::session::Session;

/// The keys under a name, in memory, and up to date as far as etcd can be reached.
///
/// Keys are given and shown without the prefix: in the cache `app`, the key `limits` is `app/limits` at etcd. Cheap to
/// clone; the cache, its streams, channels and handlers end with the last clone or with the session.
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> etcd_recipes::Result<()> {
/// use etcd_recipes::{ConfigCache, Session};
///
/// #[derive(serde::Deserialize)]
/// struct Limits { requests: u32 }
///
/// let session = Session::connect(["127.0.0.1:2379"]).await?;
/// let config = ConfigCache::open(&session, "app").await?;
/// let revision = config.publish("limits", r#"{"requests": 100}"#).await?;
/// config.wait_for(revision).await?;
/// let limits = config.get_as::<Limits>("limits")?.expect("it was just published");
/// assert_eq!(limits.requests, 100);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct ConfigCache {
    session: Session,
    cache: Arc<Cache>,
    /// The task ends with the last handle.
    _running: Arc<DropGuard>,
}

impl ConfigCache {
    /// Begins to follow the keys under `{name}/`, in the background. The cache is empty until it is
    /// [`ready`](ConfigCache::ready).
    ///
    /// # Errors
    ///
    /// [`Error::InvalidName`] if the name is empty, longer than 1,024 bytes or contains a NUL, or if the session keeps
    /// its own keys there.
    pub fn new(session: &Session, name: impl AsRef<[u8]>) -> Result<Self> {
        let (name, core) = (name.as_ref(), session.core());
        let prefix = Prefix::of_name(name)?;
        if prefix.overlaps(&core.namespace) {
            let reason = "it is that of the session's bookkeeping keys, or contains it";
            return Err(Error::InvalidName { name: name::display(name), reason });
        }
        let (cache, dropped) = (Arc::new(Cache::new(prefix)), CancellationToken::new());
        core.runtime.spawn(cache.clone().run(core.clone(), dropped.clone()));
        Ok(Self { session: session.clone(), cache, _running: Arc::new(dropped.drop_guard()) })
    }

    /// Begins to follow the keys under `{name}/`, and waits until all of them are there.
    ///
    /// There is no limit of time, and faults of etcd and of the network are waited out: wrap it in
    /// `tokio::time::timeout`, or use [`new`](ConfigCache::new) to start without etcd.
    ///
    /// # Errors
    ///
    /// As [`new`](ConfigCache::new) and [`ready`](ConfigCache::ready).
    ///
    /// # Cancel safety
    ///
    /// Nothing is left behind when dropped.
    pub async fn open(session: &Session, name: impl AsRef<[u8]>) -> Result<Self> {
        let cache = Self::new(session, name)?;
        cache.ready().await?;
        Ok(cache)
    }

    /// Waits until the first list is complete.
    ///
    /// # Errors
    ///
    /// [`Error::PermissionDenied`] or [`Error::Etcd`] when etcd refuses; the cache goes on trying, and the call may be
    /// repeated. [`Error::Closed`] when the session is closed.
    ///
    /// # Cancel safety
    ///
    /// Only waits.
    pub async fn ready(&self) -> Result<()> {
        let mut progress = self.cache.progress.subscribe();
        let come = |now: &cache::Progress| now.revision != 0 || now.refused.is_some() || now.ended;
        loop {
            let now = progress.wait_for(come).await;
            match now {
                Ok(now) if now.revision != 0 => return Ok(()),
                Ok(now) if !now.ended => {}
                _ => return Err(Error::Closed),
            }
            let mut refused = None;
            self.cache.progress.send_if_modified(|progress| {
                refused = progress.refused.take();
                false
            });
            if let Some(error) = refused {
                return Err(error);
            }
        }
    }

    /// Whether the first list is complete. Stays true.
    pub fn is_ready(&self) -> bool {
        self.revision() != 0
    }

    /// The value of a key now. No lock, no copy of the bytes.
    pub fn get(&self, key: impl AsRef<[u8]>) -> Option<ConfigEntry> {
        self.cache.get(key.as_ref())
    }

    /// The value of a key now, decoded from JSON. `None` if there is no such key.
    ///
    /// Decoded once for each version of the value, and as fast as [`get`](ConfigCache::get) after that. From the first call
    /// for a key on, a new value that does not decode is reported ([`on_problem`](ConfigCache::on_problem),
    /// [`bad_values`](ConfigCache::bad_values)) and leaves the last good one in its place. This holds for the type that a key
    /// was read as first; read as another, it is decoded at each call.
    ///
    /// # Errors
    ///
    /// [`Error::Undecodable`] when no good value is known.
    pub fn get_as<T>(&self, key: impl AsRef<[u8]>) -> Result<Option<Arc<T>>>
    where
        T: DeserializeOwned + Send + Sync + 'static,
    {
        self.cache.get_as(key.as_ref())
    }

    /// The keys whose newest value does not decode as the type they are read as.
    pub fn bad_values(&self) -> Vec<BadValue> {
        self.cache.bad_values()
    }

    /// Everything, at one revision.
    pub fn snapshot(&self) -> ConfigSnapshot {
        ConfigSnapshot { state: self.cache.state(), prefix: self.cache.prefix.as_bytes().into() }
    }

    /// The revision of the last change that is applied here, or of the last list; 0 until the first list is complete.
    pub fn revision(&self) -> i64 {
        self.cache.revision()
    }

    /// Since when changes may be missing, because etcd does not tell them; `None` while it does, as far as is known:
    /// a connection that went silent is noticed after at most 20 seconds, and [`age`](ConfigCache::age) tells.
    pub fn stale_since(&self) -> Option<Instant> {
        let since = self.cache.stale_for()?;
        Some(Instant::now().checked_sub(since).unwrap_or_else(Instant::now))
    }

    /// How old the last proof is that nothing is missing: a list, a change, or any sign of life of the stream that tells
    /// changes. Grows up to 20 seconds when nothing happens at all. `None` before the first list.
    pub fn age(&self) -> Option<Duration> {
        self.cache.age()
    }

    /// Waits until every change up to `revision` is applied here. With the revision of one's own write, to this cache or
    /// to anything else at this etcd, reads from here on show that write.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`]; [`Error::PermissionDenied`] and [`Error::Etcd`] as etcd says. While etcd is away it waits.
    ///
    /// # Cancel safety
    ///
    /// Only waits and reads.
    pub async fn wait_for(&self, revision: i64) -> Result<()> {
        self.cache.wait_for(self.session.core(), revision).await
    }

    /// Calls `handler` for the key as it is, if it is there, and then for each change of it.
    ///
    /// All handlers of a cache are called one after the other, on a thread where they may block: that delays the other
    /// handlers, and nobody else. One that fails or panics is reported, and called again for the next change.
    pub fn on_key<E, F>(&self, key: impl AsRef<[u8]>, handler: F) -> ConfigHandler
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
        F: FnMut(&ConfigChange) -> Result<(), E> + Send + 'static,
    {
        self.handle(Pattern::Key(key.as_ref().into()), handler)
    }

    /// The same for all keys that start with `prefix`; an empty one means all keys.
    pub fn on_prefix<E, F>(&self, prefix: impl AsRef<[u8]>, handler: F) -> ConfigHandler
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
        F: FnMut(&ConfigChange) -> Result<(), E> + Send + 'static,
    {
        self.handle(Pattern::Prefix(prefix.as_ref().into()), handler)
    }

    fn handle<E, F>(&self, pattern: Pattern, mut handler: F) -> ConfigHandler
    where
        E: Into<BoxError>,
        F: FnMut(&ConfigChange) -> Result<(), E> + Send + 'static,
    {
        let call = Box::new(move |change: &ConfigChange| handler(change).map_err(Into::into));
        let (handler, queue) = self.cache.followers.handler(pattern, || self.cache.state(), call);
        if let Some(queue) = queue {
            let (cache, runtime) = (self.cache.clone(), self.session.core().runtime.clone());
            self.session.core().runtime.spawn(async move { cache.call_handlers(&runtime, queue).await });
        }
        handler
    }

    /// A stream of the keys that start with `prefix` (an empty one means all keys): as they are, and then each change.
    pub fn changes(&self, prefix: impl AsRef<[u8]>) -> ConfigChanges {
        self.cache.followers.stream(Pattern::Prefix(prefix.as_ref().into()), || self.cache.state())
    }

    /// A channel that always holds the newest value of a key; values in between may be missed.
    pub fn watch(&self, key: impl AsRef<[u8]>) -> channel::Receiver<Option<ConfigEntry>> {
        let own: Box<[u8]> = key.as_ref().into();
        let cache = Arc::downgrade(&self.cache);
        let value = move || Some(cache.upgrade()?.get(&own));
        self.cache.followers.channel(key.as_ref(), value)
    }

    /// The same, decoded; the last good value stays, as with [`get_as`](ConfigCache::get_as).
    pub fn watch_as<T>(&self, key: impl AsRef<[u8]>) -> channel::Receiver<Option<Arc<T>>>
    where
        T: DeserializeOwned + Send + Sync + 'static,
    {
        let own: Box<[u8]> = key.as_ref().into();
        let cache = Arc::downgrade(&self.cache);
        let value = move || cache.upgrade()?.get_as::<T>(&own).ok();
        self.cache.followers.channel(key.as_ref(), value)
    }

    /// Calls `handler` when something goes wrong: a value that does not decode, a handler that fails, a refusal by
    /// etcd. These are logged as well. It must not block.
    pub fn on_problem(&self, handler: impl FnMut(&ConfigProblem) + Send + 'static) -> ConfigHandler {
        self.cache.followers.on_problem(Box::new(handler))
    }
}

impl std::fmt::Debug for ConfigCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConfigCache")
            .field("prefix", &self.cache.prefix)
            .field("revision", &self.revision())
            .finish_non_exhaustive()
    }
}
