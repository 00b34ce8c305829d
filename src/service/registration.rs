//! An instance that is registered.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

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
    shown: watch::Sender<Shown>,
    /// A registration keeps its session open.
    session: Session,
}

/// What a registration shows of itself.
struct Shown {
    instance: Arc<Instance>,
    /// Updates follow one another.
    updating: bool,
}

/// An update that is under way in the session. Undone when it is dropped, unless it has come into effect.
struct Updating {
    shown: watch::Sender<Shown>,
    before: Arc<Instance>,
    done: bool,
}

impl Updating {
    fn end(mut self, done: bool) {
        self.done = done;
    }
}

impl Drop for Updating {
    fn drop(&mut self) {
        self.shown.send_modify(|shown| {
            shown.updating = false;
            if !self.done {
                shown.instance = self.before.clone();
            }
        });
    }
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
        let shown = watch::Sender::new(Shown { instance: Arc::new(instance), updating: false });
        Ok(Self { format, key, shown, session: session.clone() })
    }

    /// The instance as it was registered or updated last.
    pub fn instance(&self) -> Arc<Instance> {
        self.shown.borrow().instance.clone()
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
    /// Updates take effect one after the other, each on top of what the one before it has left. While the registration is
    /// away, an update comes into effect when it is back.
    ///
    /// # Errors
    ///
    /// [`Error::Superseded`] when somebody else has registered the same id; [`Error::Lost`] when it was deregistered;
    /// [`Error::InvalidInstance`] when the change
    /// would move it to another key or cannot be written; otherwise as etcd says: the last good state stays then.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the update goes on in the background if it was sent.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(registration: etcd_recipes::service::Registration) -> etcd_recipes::Result<()> {
    /// registration.update(|instance| instance.weight = 3).await?;
    /// # Ok(()) }
    /// ```
    pub async fn update(&self, change: impl FnOnce(&mut Instance)) -> Result<()> {
        let updating = self.begin().await;
        let mut instance = Instance::clone(&updating.before);
        change(&mut instance);
        let Written { key, value, .. } = Written::new(&*self.format, &self.session, &instance)?;
        if key != self.key.key() {
            return Err(Error::InvalidInstance {
                what: name::display(format!("{} {}", instance.service, instance.id).as_bytes()),
                reason: "the change would move it to another key; register it anew".into(),
            });
        }
        let updated = self.key.update(value)?;
        self.shown.send_modify(|shown| shown.instance = Arc::new(instance));
        let update = async move {
            let result = updated.await;
            updating.end(result.is_ok());
            result
        };
        self.session.core().to_the_end(update).await
    }

    /// Waits until no update is under way, and begins one.
    async fn begin(&self) -> Updating {
        let mut shown = self.shown.subscribe();
        loop {
            // Whoever waits has no claim on the turn: who is not polled keeps nobody waiting.
            let _ = shown.wait_for(|shown| !shown.updating).await;
            if self.shown.send_if_modified(|shown| !std::mem::replace(&mut shown.updating, true)) {
                let before = self.instance();
                return Updating { shown: self.shown.clone(), before, done: false };
            }
        }
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
