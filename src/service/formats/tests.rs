//! The documented bytes of each format, both ways, and what is refused.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::service::{Format, Instance};

/// Writes exactly this, and reads it back.
fn both_ways(format: &impl Format, instance: &Instance, key: &str, value: &str) {
    assert_eq!(String::from_utf8(format.key(instance).unwrap()).unwrap(), key);
    assert_eq!(String::from_utf8(format.encode(instance).unwrap()).unwrap(), value);
    reads(format, instance, key, value);
}

fn reads(format: &impl Format, instance: &Instance, key: &str, value: &str) {
    let prefix = format.prefix(&instance.service).unwrap();
    assert!(key.as_bytes().starts_with(&prefix));
    let read = format.decode(&instance.service, key.as_bytes(), value.as_bytes()).unwrap();
    let read = read.unwrap();
    assert_eq!(read, *instance);
    assert_eq!(read.metadata, instance.metadata);
}

fn skips(format: &impl Format, service: &str, key: &str, value: &str) {
    assert_eq!(format.decode(service, key.as_bytes(), value.as_bytes()), Ok(None), "{key}");
}

fn refuses(format: &impl Format, service: &str, key: &[u8], value: &[u8]) {
    let error = format.decode(service, key, value).unwrap_err().to_string();
    assert!(!error.contains("secret"), "{error}");
}

#[test]
fn json() {
    let plain = Instance::new("courseware", "10.0.0.7:8400").id("a");
    both_ways(&Json::default(), &plain, "services/courseware/a", r#"{"address":"10.0.0.7:8400","weight":1}"#);
    let full = plain.version("1.2.0").weight(3).metadata("zone", "a").tag("blue");
    both_ways(
        &Json::under("/reg/"),
        &full,
        "/reg/courseware/a",
        r#"{"address":"10.0.0.7:8400","version":"1.2.0","weight":3,"metadata":{"zone":"a"},"tags":["blue"]}"#,
    );
    skips(&Json::default(), "a", "services/a/b/c", r#"{"address":"x:1"}"#);
    let key = b"services/a/b";
    for bad in [
        &b"secret"[..],
        b"\xff",
        b"",
        b"{}",
        br#"{"address":""}"#,
        br#"{"address":"x:1","weight":"secret"}"#,
        br#"{"address":"x:1","weight":-1}"#,
        br#"{"address":"x:1","metadata":"secret"}"#,
    ] {
        refuses(&Json::default(), "a", key, bad);
    }
    refuses(&Json::default(), "a", b"services/a/\xff", br#"{"address":"x:1"}"#);
}

#[test]
fn endpoints() {
    let instance = Instance::new("my-service", "10.0.0.1:50051");
    both_ways(
        &Endpoints,
        &instance,
        "my-service/10.0.0.1:50051",
        r#"{"Op":0,"Addr":"10.0.0.1:50051","Metadata":null}"#,
    );
    both_ways(
        &Endpoints,
        &instance.clone().weight(7).version("2").metadata("zone", "b").tag("blue"),
        "my-service/10.0.0.1:50051",
        r#"{"Op":0,"Addr":"10.0.0.1:50051","Metadata":{"tags":["blue"],"version":"2","weight":"7","zone":"b"}}"#,
    );
    let key = "my-service/10.0.0.1:50051";
    reads(
        &Endpoints,
        &instance.clone().weight(7),
        key,
        r#"{"Addr":"10.0.0.1:50051","Metadata":{"weight":7}}"#,
    );
    let text = instance.metadata("Metadata", "any");
    reads(&Endpoints, &text, key, r#"{"Op":0,"Addr":"10.0.0.1:50051","Metadata":"any"}"#);
    let heavy = br#"{"Addr":"x:1","Metadata":{"weight":"secret"}}"#;
    for bad in [&b"secret"[..], b"{}", br#"{"Addr":7}"#, heavy] {
        refuses(&Endpoints, "my-service", key.as_bytes(), bad);
    }
}

#[test]
fn go_zero() {
    let instance = Instance::new("user.rpc", "192.168.1.5:8081");
    let key = "user.rpc/7587869134816538142";
    both_ways(&GoZero, &instance, "user.rpc/192.168.1.5:8081", "192.168.1.5:8081");
    assert_eq!(GoZero.key(&instance.clone().id("7587869134816538142")).unwrap(), key.as_bytes());
    reads(&GoZero, &instance, key, "192.168.1.5:8081");
    refuses(&GoZero, "user.rpc", key.as_bytes(), b"");
    refuses(&GoZero, "user.rpc", key.as_bytes(), b"secret\xff");
}

#[test]
fn kratos() {
    let user = Instance::new("user", "127.0.0.1:9000").id("u1").version("v1.2.0").weight(10);
    both_ways(
        &Kratos::default(),
        &user,
        "/microservices/user/u1",
        r#"{"id":"u1","name":"user","version":"v1.2.0","metadata":{"weight":"10"},"endpoints":["grpc://127.0.0.1:9000?isSecure=false"]}"#,
    );
    let written = r#"{"id":"u1","name":"user","version":"v1.2.0","metadata":{"weight":"10"},"endpoints":["http://127.0.0.1:8000?isSecure=false","grpc://127.0.0.1:9000?isSecure=false"]}"#;
    reads(&Kratos::default(), &user, "/microservices/user/u1", written);
    let web = Kratos::default().namespace("/web").scheme("http");
    let user = Instance { address: "127.0.0.1:8000".into(), ..user };
    reads(&web, &user, "/web/user/u1", written);
    let bare = Instance::new("user", "127.0.0.1:9000").id("u1");
    let null =
        r#"{"id":"u1","name":"user","version":"","metadata":null,"endpoints":["grpc://127.0.0.1:9000"]}"#;
    reads(&Kratos::default(), &bare, "/microservices/user/u1", null);
    skips(&Kratos::default(), "use", "/microservices/user/u1", written);
    skips(&Kratos::default(), "user", "/microservices/user/u1", &written.replace("\"user\"", "\"other\""));
    let key = b"/microservices/user/u1";
    let heavy = written.replace("\"10\"", "\"secret\"");
    let nowhere = br#"{"id":"u1","name":"user","endpoints":null}"#;
    let odd = br#"{"id":"u1","name":"user","endpoints":["secret"]}"#;
    for bad in [&b"secret"[..], b"{}", heavy.as_bytes(), nowhere, odd] {
        refuses(&Kratos::default(), "user", key, bad);
    }
}

#[test]
fn kitex() {
    let instance = Instance::new("echo", "192.168.196.240:8888").weight(10);
    let key = "kitex/registry-etcd/echo/192.168.196.240:8888";
    let value = r#"{"network":"tcp","address":"192.168.196.240:8888","weight":10,"tags":null}"#;
    both_ways(&Kitex, &instance, key, value);
    reads(&Kitex, &instance, key, &value.replace("10", "0"));
    let tagged = instance.metadata("zone", "b");
    both_ways(&Kitex, &tagged, key, &value.replace("null", r#"{"zone":"b"}"#));
    assert!(Kitex.prefix("a/b").is_err());
    for bad in [&b"secret"[..], br#"{"weight":10}"#, br#"{"address":"x:1","weight":"secret"}"#] {
        refuses(&Kitex, "echo", key.as_bytes(), bad);
    }
}

#[test]
fn name_ip() {
    let instance = Instance::new("rpc.courseware", "127.0.0.1:8400");
    let key = "rpc.courseware/127.0.0.1:8400";
    let value = r#"{"Name":"rpc.courseware","Ip":"127.0.0.1:8400"}"#;
    both_ways(&NameIp, &instance, key, value);
    skips(&NameIp, "rpc.courseware", key, &value.replace("courseware", "other"));
    skips(&NameIp, "rpc.course", key, value);
    for bad in [&b"secret"[..], b"{}", br#"{"Name":"rpc.courseware","Ip":""}"#] {
        refuses(&NameIp, "rpc.courseware", key.as_bytes(), bad);
    }
}

#[test]
fn gateway() {
    let instance = Instance::new("rpc.courseware", "127.0.0.1:8400").id("7587869134816538142");
    let key = "rpc.courseware7587869134816538142";
    both_ways(&Gateway, &instance, key, "127.0.0.1:8400");
    skips(&Gateway, "rpc.course", key, "127.0.0.1:8400");
    skips(&Gateway, "rpc.courseware", "rpc.courseware_b12", "127.0.0.1:8400");
    refuses(&Gateway, "rpc.courseware", key.as_bytes(), b"");
    assert!(Gateway.key(&instance.id("127.0.0.1:8400")).is_err());
    assert!(Gateway.prefix("node2").is_err(), "its keys would be those of a service called node");
}

#[test]
fn versioned() {
    let instance = Instance::new("node", "10.0.0.1:8089").version("1.0.0").weight(1);
    let value = r#"{"name":"node","addr":"10.0.0.1:8089","version":"1.0.0","weight":1}"#;
    both_ways(&Versioned, &instance, "/node/1.0.0/10.0.0.1:8089", value);
    let bare = instance.version("").weight(3);
    let value = r#"{"name":"node","addr":"10.0.0.1:8089","version":"","weight":3}"#;
    both_ways(&Versioned, &bare, "/node/10.0.0.1:8089", value);
    skips(&Versioned, "node", "/node/10.0.0.1:8089", &value.replace("\"node\"", "\"other\""));
    for bad in [&b"secret"[..], b"{}", br#"{"name":"node","addr":"x:1","weight":"secret"}"#] {
        refuses(&Versioned, "node", b"/node/x:1", bad);
    }
}

#[test]
fn namespaced() {
    let instance = Instance::new("greet", "127.0.0.1:3000");
    both_ways(&Namespaced, &instance, "/ns/greet/127.0.0.1:3000", "127.0.0.1:3000");
    skips(&Namespaced, "greet", "/ns/greet/er/127.0.0.1:3000", "127.0.0.1:3000");
    refuses(&Namespaced, "greet", b"/ns/greet/127.0.0.1:3000", b"\xffsecret");
}

#[test]
fn what_is_not_a_key_is_refused() {
    for instance in [Instance::new("", "x:1"), Instance::new("a\0", "x:1"), Instance::new("a", "")] {
        let formats: [&dyn Format; 8] = [
            &Json::default(),
            &Endpoints,
            &GoZero,
            &Kratos::default(),
            &Kitex,
            &NameIp,
            &Versioned,
            &Namespaced,
        ];
        for format in formats {
            assert!(format.key(&instance).is_err() || format.encode(&instance).is_err(), "{instance:?}");
        }
    }
    assert!(Json::default().key(&Instance::new("a", "x:1").id("b/c")).is_err());
}

fn instances() -> impl Strategy<Value = Instance> {
    let name = "[a-z.]{1,8}";
    let texts = prop::collection::btree_map("[a-uz]{1,5}", ".{0,9}", 0..4);
    let tags = prop::collection::vec(".{0,6}", 0..3);
    (name, "[a-z0-9-]{1,9}", "[a-z0-9.]{1,9}:[0-9]{1,5}", "[a-z0-9.]{0,5}", 0..u32::MAX, texts, tags)
        .prop_map(|(service, id, address, version, weight, metadata, tags)| Instance {
            service,
            id,
            address,
            version,
            weight,
            metadata,
            tags,
        })
}

fn round_trip(format: &impl Format, instance: &Instance) -> Instance {
    let (key, value) = (format.key(instance).unwrap(), format.encode(instance).unwrap());
    format.decode(&instance.service, &key, &value).unwrap().unwrap()
}

proptest! {
    #[test]
    fn what_a_format_carries_comes_back(instance in instances()) {
        prop_assert_eq!(&round_trip(&Json::default(), &instance), &instance);
        prop_assert_eq!(&round_trip(&Endpoints, &instance), &instance);
        let kratos = round_trip(&Kratos::default(), &instance);
        prop_assert_eq!(kratos, Instance { tags: Vec::new(), ..instance.clone() });
        let addressed = Instance::new(&instance.service, &instance.address);
        prop_assert_eq!(&round_trip(&GoZero, &instance), &addressed);
        prop_assert_eq!(&round_trip(&NameIp, &instance), &addressed);
        prop_assert_eq!(&round_trip(&Namespaced, &instance), &addressed);
        let versioned = addressed.clone().version(&instance.version).weight(instance.weight);
        prop_assert_eq!(round_trip(&Versioned, &instance), versioned);
        let kitex = Instance { metadata: instance.metadata.clone(), ..addressed.weight(instance.weight.max(1)) };
        let instance = Instance { weight: instance.weight.max(1), ..instance };
        prop_assert_eq!(round_trip(&Kitex, &instance), kitex);
    }

    #[test]
    fn no_bytes_make_a_format_panic(key in prop::collection::vec(any::<u8>(), 0..20), value in prop::collection::vec(any::<u8>(), 0..40)) {
        let formats: [&dyn Format; 9] =
            [&Json::default(), &Endpoints, &GoZero, &Kratos::default(), &Kitex, &NameIp, &Gateway, &Versioned, &Namespaced];
        for format in formats {
            let key = [format.prefix("a").unwrap(), key.clone()].concat();
            let _ = format.decode("a", &key, &value);
        }
    }
}
