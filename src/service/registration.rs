//! An instance that is registered.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::{Format, FormatError, Instance};
use crate::error::{Error, Result};
use crate::name::{self, Prefix};
use crate::session::Session;
use crate::session::kept::{KeptKey, Standing};

/// An instance that is registered, until this is dropped.
///
/// It lives on the session's lease, and comes back by itself: after the lease was lost, within moments of etcd
/// answering again, and after somebody has deleted its key. It never takes the place of a newer registration of the same
/// id, however late this process is, and never removes one.
///
/// # Drop behaviour
///
/// Dropping it deregisters in the background. Call [`deregister`](Registration::deregister) to know that it is done, and
/// [`drain`](Registration::drain) before stopping a server.
#[must_use = "a registration that is not kept is deregistered at once"]
pub struct Registration {
    format: Arc<dyn Format>,
    key: KeptKey,
    instances: Arc<Mutex<Instances>>,
    /// Each change is made on top of the one before. Not that of the instances, at which the change may look.
    changing: Mutex<()>,
    /// A registration keeps its session open.
    session: Session,
}

/// The states of an instance.
struct Instances {
    /// The newest that is known to be in effect.
    written: Arc<Instance>,
    /// Those that are being written, by number.
    under_way: BTreeMap<u64, Arc<Instance>>,
}

/// An update that is being written. Undone when it is dropped.
struct Update {
    instances: Arc<Mutex<Instances>>,
    number: u64,
}

/// What is known of a registration; see [`Registration::state`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegistrationState {
    /// It is there, as far as this process knows.
    Registered,
    /// It was lost, and comes back as soon as etcd answers.
    Away,
    /// Somebody else has registered the same id since. Final.
    Superseded,
    /// It was deregistered. Final.
    Deregistered,
}

/// What is written for an instance.
pub(super) struct Written {
    prefix: Prefix,
    key: Vec<u8>,
    value: Vec<u8>,
}

impl Written {
    pub(super) fn new(format: &dyn Format, session: &Session, instance: &Instance) -> Result<Self> {
        let refuse = |error: FormatError| Error::InvalidInstance {
            what: name::display(format!("{} {}", instance.service, instance.id).as_bytes()),
            reason: error.to_string(),
        };
        let prefix = format.prefix(&instance.service).map_err(refuse)?;
        let (key, value) = (format.key(instance).map_err(refuse)?, format.encode(instance).map_err(refuse)?);
        if !key.starts_with(&prefix) || key.len() == prefix.len() {
            return Err(refuse(FormatError::new("its key does not start with the prefix of its service")));
        }
        if key.len() > 2 * name::MAX_NAME {
            return Err(refuse(FormatError::new("its key is longer than 2,048 bytes")));
        }
        Ok(Self { prefix: usable(session, &prefix)?, key, value })
    }
}

/// Refuses prefixes that hold the session's own keys.
pub(super) fn usable(session: &Session, prefix: &[u8]) -> Result<Prefix> {
    let usable = Prefix::of_bytes(prefix)?;
    if usable.overlaps(&session.core().namespace) {
        let reason = "it is that of the session's bookkeeping keys, or contains it";
        return Err(Error::InvalidName { name: name::display(prefix), reason });
    }
    Ok(usable)
}

impl Registration {
    pub(super) async fn new(session: &Session, format: Arc<dyn Format>, instance: Instance) -> Result<Self> {
        let Written { prefix, key, value } = Written::new(&*format, session, &instance)?;
        let key = session.core().keep(prefix, key, value).await?;
        let instances = Instances { written: Arc::new(instance), under_way: BTreeMap::new() };
        let (instances, changing) = (Arc::new(Mutex::new(instances)), Mutex::default());
        Ok(Self { format, key, instances, changing, session: session.clone() })
    }

    /// The instance as it was registered or updated last.
    pub fn instance(&self) -> Arc<Instance> {
        lock(&self.instances).newest().clone()
    }

    /// The key that stands for it.
    pub fn key(&self) -> &[u8] {
        self.key.key()
    }

    /// What is known of it.
    pub fn state(&self) -> RegistrationState {
        match self.key.standing() {
            Standing::There => RegistrationState::Registered,
            Standing::Away => RegistrationState::Away,
            Standing::Superseded => RegistrationState::Superseded,
            Standing::Removed => RegistrationState::Deregistered,
        }
    }

    /// Waits until somebody else has registered the same id. This process should stop serving under it then.
    ///
    /// # Cancel safety
    ///
    /// Only waits.
    pub fn superseded(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        self.key.superseded()
    }

    /// Changes weight, metadata, tags or whatever else the key does not depend on. Discovery sees it at once, in place.
    ///
    /// Updates take effect in the order in which they are called, each on top of the one before; several at once may be
    /// written as one. While the registration is away, an update comes into effect when it is back.
    /// `change` is called at once, and cannot itself update this registration.
    ///
    /// # Errors
    ///
    /// [`Error::Superseded`] when somebody else has registered the same id; [`Error::Lost`] when it was deregistered;
    /// [`Error::Closed`] when the session is closed;
    /// [`Error::InvalidInstance`] when the change
    /// would move it to another key or cannot be written; otherwise as etcd says: the last good state stays then.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the update goes on in the background.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(registration: etcd_recipes::service::Registration) -> etcd_recipes::Result<()> {
    /// registration.update(|instance| instance.weight = 3).await?;
    /// # Ok(()) }
    /// ```
    pub async fn update(&self, change: impl FnOnce(&mut Instance)) -> Result<()> {
        let (answer, answered) = oneshot::channel();
        {
            let _turn = lock(&self.changing);
            let mut instance = Instance::clone(&self.instance());
            change(&mut instance);
            let Written { key, value, .. } = Written::new(&*self.format, &self.session, &instance)?;
            if key != self.key.key() {
                return Err(Error::InvalidInstance {
                    what: name::display(format!("{} {}", instance.service, instance.id).as_bytes()),
                    reason: "the change would move it to another key; register it anew".into(),
                });
            }
            let update = Update::new(&self.instances, instance);
            let settle = move |result: Result<()>| {
                update.end(result.is_ok());
                let _ = answer.send(result);
            };
            self.key.update(value, settle)?;
        }
        answered.await.unwrap_or(Err(Error::Closed))
    }

    /// Removes the registration, if it is still the newest of its id. Goes on until etcd has confirmed, or the lease is
    /// over. It does not take the registration by value, because a server shares it with whoever changes its weight;
    /// what was deregistered stays so, and doing it again is fine.
    ///
    /// # Errors
    ///
    /// [`Error::Superseded`] when somebody else has registered the same id: that registration stays.
    ///
    /// # Cancel safety
    ///
    /// When dropped, it goes on in the background.
    pub async fn deregister(&self) -> Result<()> {
        self.key.remove().await
    }

    /// Removes the registration and waits, so that everybody who calls this instance has heard of it: stop the server
    /// after that, and no call fails.
    ///
    /// Callers hear of it within milliseconds as a rule; `wait` also covers calls that are under way. A second is a good
    /// start.
    ///
    /// # Errors
    ///
    /// As [`deregister`](Registration::deregister), at once.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the deregistration goes on in the background.
    pub async fn drain(&self, wait: Duration) -> Result<()> {
        self.deregister().await?;
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

impl std::fmt::Debug for Registration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registration")
            .field("key", &name::display(self.key()))
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

// === impl Instances ===

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Instances {
    fn newest(&self) -> &Arc<Instance> {
        self.under_way.last_key_value().map_or(&self.written, |(_, instance)| instance)
    }
}

impl Update {
    fn new(instances: &Arc<Mutex<Instances>>, instance: Instance) -> Self {
        let mut now = lock(instances);
        let number = now.under_way.last_key_value().map_or(0, |(newest, _)| newest + 1);
        now.under_way.insert(number, Arc::new(instance));
        Self { instances: instances.clone(), number }
    }

    fn end(self, in_effect: bool) {
        let mut now = lock(&self.instances);
        if let Some(instance) = now.under_way.remove(&self.number).filter(|_| in_effect) {
            now.written = instance;
        }
    }
}

impl Drop for Update {
    fn drop(&mut self) {
        lock(&self.instances).under_way.remove(&self.number);
    }
}
