//! Services: who runs where, and which of them takes the next call.
//!
//! A server [registers](Services::register) itself as an [`Instance`] of a service; the [`Registration`] lives on the
//! session's lease, comes back when it is lost, and gives way to a newer one of the same id.
//!
//! A client [discovers](Services::discover) the instances: a [`Discovery`] keeps the list up to date, and serves the last
//! known one while etcd is away. A [`Balancer`] chooses among them.
//!
//! Instances are written to etcd in a [`Format`]; [`formats`] has those of other programs.

mod balancer;
#[cfg(feature = "tonic")]
mod channel;
mod discovery;
mod format;
pub mod formats;
mod instance;
mod registration;

use std::sync::Arc;

pub use self::balancer::{Balancer, Pick, Policy};
#[cfg(feature = "tonic")]
#[cfg_attr(docsrs, doc(cfg(feature = "tonic")))]
pub use self::channel::{ChannelBuilder, ServiceChannel};
pub use self::discovery::{Change, Changes, Discovery, DiscoveryBuilder, Malformed, Snapshot};
pub use self::format::{Format, FormatError};
pub use self::instance::Instance;
pub use self::registration::{Registration, RegistrationState};
use crate::error::Result;
use crate::session::Session;

/// The services on one etcd cluster, in one format.
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> etcd_recipes::Result<()> {
/// use std::time::Duration;
/// use etcd_recipes::Session;
/// use etcd_recipes::service::{Instance, Services};
///
/// let session = Session::connect(["127.0.0.1:2379"]).await?;
/// let services = Services::new(&session);
/// let instance = Instance::new("courseware", "10.0.0.7:8400").version("1.2.0").weight(2);
/// let registration = services.register(instance).await?;
/// // … serve …
/// registration.update(|instance| instance.weight = 3).await?;
/// // No more calls from now on; those under way have a second.
/// registration.drain(Duration::from_secs(1)).await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Services {
    session: Session,
    format: Arc<dyn Format>,
}

impl Services {
    /// In the format of this crate, [`formats::Json`]. Nothing is sent.
    pub fn new(session: &Session) -> Self {
        Self::with_format(session, formats::Json::default())
    }

    /// In another format. Nothing is sent.
    pub fn with_format(session: &Session, format: impl Format) -> Self {
        Self { session: session.clone(), format: Arc::new(format) }
    }

    /// Registers an instance, and keeps it registered.
    ///
    /// It takes the place of an earlier registration of the same id, whose owner finds itself superseded. Thousands of
    /// them share the lease and the requests of the session.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidInstance`](crate::Error::InvalidInstance) and [`Error::InvalidName`](crate::Error::InvalidName)
    /// when it cannot be written; [`Error::TooLarge`](crate::Error::TooLarge);
    /// [`Error::Superseded`](crate::Error::Superseded) when the same id was registered again before this call was
    /// through; [`Error::NoSpace`](crate::Error::NoSpace), [`Error::PermissionDenied`](crate::Error::PermissionDenied)
    /// and [`Error::Etcd`](crate::Error::Etcd) as etcd says; [`Error::Closed`](crate::Error::Closed). Faults that pass
    /// are waited out, without a limit of time.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the instance is not registered, or is deregistered again.
    pub async fn register(&self, instance: Instance) -> Result<Registration> {
        Registration::new(&self.session, self.format.clone(), instance).await
    }

    /// Begins to follow the instances of a service.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(session: etcd_recipes::Session) -> etcd_recipes::Result<()> {
    /// use etcd_recipes::service::{Balancer, Policy, Services};
    ///
    /// let discovery = Services::new(&session).discover("courseware").version("1.2.0").open().await?;
    /// let balancer = Balancer::new(Policy::RoundRobin);
    /// if let Some(pick) = balancer.pick(&discovery.snapshot().instances) {
    ///     println!("calling {}", pick.instance().address);
    /// }
    /// # Ok(()) }
    /// ```
    pub fn discover(&self, service: impl Into<String>) -> DiscoveryBuilder {
        DiscoveryBuilder::new(self, service.into())
    }
}

impl std::fmt::Debug for Services {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Services").field("session", &self.session).finish_non_exhaustive()
    }
}
