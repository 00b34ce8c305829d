//! What is registered and discovered.

use std::collections::BTreeMap;

/// One running instance of a service.
///
/// Not every [`Format`](super::Format) has a place for every field; what it has no place for is left out when an
/// instance is registered, and has its default when one is discovered.
///
/// # Examples
///
/// ```
/// use etcd_recipes::service::Instance;
///
/// let instance = Instance::new("courseware", "10.0.0.7:8400").version("1.2.0").weight(3).tag("blue");
/// assert_eq!(instance.id, "10.0.0.7:8400");
/// ```
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Instance {
    /// The name of the service.
    pub service: String,
    /// Tells the instances of a service apart. Of two registrations of one id the later takes the place of the
    /// earlier. Defaults to the address.
    pub id: String,
    /// Where it is reached: `host:port`.
    pub address: String,
    /// Its version; empty by default.
    pub version: String,
    /// Its share of the calls, next to the weights of the others. 0: none, as long as another has more. Defaults to 1.
    pub weight: u32,
    /// Whatever else is to be known. Everybody who can read the keys can read it.
    pub metadata: BTreeMap<String, String>,
    /// Labels to choose by.
    pub tags: Vec<String>,
}

impl Instance {
    /// Describes an instance at an address, `host:port`, which is also its id.
    pub fn new(service: impl Into<String>, address: impl Into<String>) -> Self {
        let address = address.into();
        Self {
            service: service.into(),
            id: address.clone(),
            address,
            version: String::new(),
            weight: 1,
            metadata: BTreeMap::new(),
            tags: Vec::new(),
        }
    }

    /// Sets the id.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = id.into();
        self
    }

    /// Sets the version.
    #[must_use]
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = version.into();
        self
    }

    /// Sets the weight.
    #[must_use]
    pub fn weight(mut self, weight: u32) -> Self {
        self.weight = weight;
        self
    }

    /// Adds an entry to the metadata.
    #[must_use]
    pub fn metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(name.into(), value.into());
        self
    }

    /// Adds a tag.
    #[must_use]
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.tags.push(tag.into());
        self
    }
}

impl std::fmt::Debug for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Metadata may hold what is not for logs: only its names are shown.
        f.debug_struct("Instance")
            .field("service", &self.service)
            .field("id", &self.id)
            .field("address", &self.address)
            .field("version", &self.version)
            .field("weight", &self.weight)
            .field("metadata", &self.metadata.keys().collect::<Vec<_>>())
            .field("tags", &self.tags)
            .finish()
    }
}
