//! TLS certificates for the length of a test.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

/// Signs certificates.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, in PEM.
pub(crate) struct Certified {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("no key");
        Self(CertifiedIssuer::self_signed(params, key).expect("no authority"))
    }

    /// Its own certificate, in PEM.
    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for who is at this address.
    pub(crate) fn certify(&self, address: &str) -> Certified {
        let params = CertificateParams::new(vec![address.to_owned()]).expect("not a name");
        let key = KeyPair::generate().expect("no key");
        let certificate = params.signed_by(&key, &self.0).expect("not signed").pem();
        Certified { certificate, key: key.serialize_pem() }
    }
}
