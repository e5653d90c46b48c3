//! The settings of the bus: the brokers, how topics are created, and options for the Kafka client.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    str::FromStr,
    time::Duration,
};

use annals::{
    BusError,
    secret::{self, SecretError},
};
use percent_encoding::percent_decode_str;
use rdkafka::{ClientConfig, error::KafkaError, types::RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN as UNKNOWN};

/// The default number of partitions of a topic that the bus creates. The number of partitions also limits how many
/// members of a group can share the work.
const PARTITIONS_DEFAULT: u32 = 8;
/// The settings that would replace the brokers of the URL.
const BROKERS: [&str; 2] = ["bootstrap.servers", "metadata.broker.list"];
/// The names to suggest when a URL parameter is misspelt: the parameters that are not librdkafka settings, and a few
/// librdkafka settings.
const PARAMETERS: [&str; 8] = [
    "prefix",
    "partitions",
    "replication",
    "retention.ms",
    "security.protocol",
    "sasl.mechanism",
    "sasl.username",
    "sasl.password",
];
/// The maximum length of a prefix. Brokers accept topic names of up to 249 characters.
const PREFIX_MAX: usize = 100;
/// The maximum number of partitions: a broker would take minutes to create more.
const PARTITIONS_MAX: u32 = 10_000;

/// The address of a Kafka cluster, and how to use the cluster. The settings can be parsed from a URL of the form
/// `kafka://host:port[,host:port][?name=value&…]`, where each name is `prefix`, `partitions`, `replication`,
/// `retention.ms`, or a librdkafka setting such as `security.protocol`. Values are percent-encoded. The value of a
/// librdkafka setting can also come from a file or an environment variable: `sasl.password_file=PATH`,
/// `sasl.password_env=VARIABLE`.
///
/// ```
/// let settings: annals_kafka::Settings = "kafka://a:9092,b:9092?partitions=12&replication=3&sasl.password=p%26q".parse()?;
/// assert_eq!(settings.to_string(), "kafka://a:9092,b:9092");
/// assert!(!format!("{settings:?}").contains("p&q"));
/// # Ok::<(), annals::BusError>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Settings {
    brokers: String,
    /// The prefix of all topics and groups; empty for none.
    prefix: String,
    pub(crate) partitions: u32,
    pub(crate) replication: Option<u16>,
    pub(crate) retention: Option<Duration>,
    /// The name of this process in all groups.
    pub(crate) instance: Option<String>,
    client: BTreeMap<String, String>,
}

impl Settings {
    /// Creates the default settings for these brokers, `host:port[,host:port]`.
    pub fn new(brokers: &str) -> Self {
        Self {
            brokers: brokers.to_owned(),
            prefix: String::new(),
            partitions: PARTITIONS_DEFAULT,
            replication: None,
            retention: None,
            instance: None,
            client: BTreeMap::new(),
        }
    }

    /// Sets a prefix for the names of all topics and consumer groups on the cluster, so that several installations can
    /// share one cluster. The default is no prefix. All services of an installation need the same prefix. Do not
    /// change the prefix of an installation that has sent messages.
    ///
    /// ```
    /// let settings = annals_kafka::Settings::new("localhost:9092").prefix("staging.");
    /// assert_eq!(settings, "kafka://localhost:9092?prefix=staging.".parse()?);
    /// # Ok::<(), annals::BusError>(())
    /// ```
    pub fn prefix(mut self, prefix: &str) -> Self {
        self.prefix = prefix.to_owned();
        self
    }

    /// Returns the name that a topic or group has on the cluster.
    pub(crate) fn on_cluster(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Returns the name of a topic without the prefix, or `None` if the topic belongs to another installation.
    pub(crate) fn without_prefix<'n>(&self, name: &'n str) -> Option<&'n str> {
        name.strip_prefix(&*self.prefix)
    }

    pub(crate) fn has_prefix(&self) -> bool {
        !self.prefix.is_empty()
    }

    /// Checks the prefix against the characters that brokers accept in the name of a topic.
    pub(crate) fn check_prefix(&self) -> Result<(), BusError> {
        let is_of_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if self.prefix.len() <= PREFIX_MAX && self.prefix.bytes().all(is_of_name) {
            return Ok(());
        }
        Err(BusError::Misconfigured(format!(
            "the prefix {:?} cannot begin the name of a topic: use letters, digits, `.`, `_` and `-`, at most {PREFIX_MAX}",
            self.prefix
        )))
    }

    /// Sets the number of partitions with which missing topics are created; the default is 8. Do not change the number
    /// of partitions of an existing topic: messages stay in order per key only while the number stays the same.
    pub fn partitions(mut self, partitions: u32) -> Self {
        self.partitions = partitions;
        self
    }

    /// Sets the replication factor with which missing topics are created; the default is the cluster's.
    pub fn replication(mut self, replication: u16) -> Self {
        self.replication = Some(replication);
        self
    }

    /// Sets the retention with which missing topics are created; the default is the cluster's.
    pub fn retention(mut self, retention: Duration) -> Self {
        self.retention = Some(retention);
        self
    }

    /// Sets a librdkafka setting, for example for TLS or SASL: `set("security.protocol", "SASL_SSL")`. Settings on
    /// which the order of messages depends cannot be changed. `group.instance.id` is the name of this process; each
    /// group member of the process appends a number to this name.
    pub fn set(mut self, name: &str, value: &str) -> Self {
        if name == "group.instance.id" {
            self.instance = Some(value.to_owned());
            return self;
        }
        self.client.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Returns a message from the client or a broker, or a placeholder if the message repeats a value that may be a
    /// secret.
    pub(crate) fn without_secrets<'t>(&self, text: &'t str) -> &'t str {
        let is_secret =
            |name: &str| ["password", "secret", "key", "token", "config"].iter().any(|word| name.contains(word));
        let mut secrets = self.client.iter().filter(|(name, value)| is_secret(name) && !value.is_empty());
        if secrets.any(|(_, value)| text.contains(&**value)) { "it says why, and repeats a secret" } else { text }
    }

    /// Returns the settings that producers and consumers share.
    pub(crate) fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.brokers)
            .set("client.id", "annals")
            // Nagle's algorithm trades latency for throughput, and Kafka batches by itself.
            .set("socket.nagle.disable", "true")
            // With this setting, the client reconnects within a second once a broker is reachable again.
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "1000");
        config
    }

    /// Returns the settings that all consumers share, including those that only inspect topics.
    pub(crate) fn consumer(&self) -> ClientConfig {
        let mut config = self.client();
        // A broker must not create a missing topic with its own default number of partitions.
        config.set("allow.auto.create.topics", "false");
        config
    }

    /// Adds the user's settings, then the fixed settings.
    pub(crate) fn finish(&self, mut config: ClientConfig, fixed: &[(&str, &str)]) -> Result<ClientConfig, BusError> {
        if let Some(name) = BROKERS.into_iter().find(|name| self.client.contains_key(*name)) {
            let brokers = &self.brokers;
            let reason = format!("{name} cannot be set, because the brokers are already named: {brokers}");
            return Err(BusError::Misconfigured(reason));
        }
        for (name, value) in &self.client {
            config.set(name, value);
        }
        for (name, value) in fixed {
            if self.client.get(*name).is_some_and(|asked| asked != value) {
                let reason = format!("{name} must be {value}: otherwise messages could be lost or reordered");
                return Err(BusError::Misconfigured(reason));
            }
            config.set(*name, *value);
        }
        Ok(config)
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kafka://{}", self.brokers)
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Prints names only: any value may be a secret.
        let client: Vec<_> = self.client.keys().collect();
        f.debug_struct("Settings")
            .field("brokers", &self.brokers)
            .field("prefix", &self.prefix)
            .field("partitions", &self.partitions)
            .field("replication", &self.replication)
            .field("retention", &self.retention)
            .field("client", &client)
            .finish()
    }
}

impl FromStr for Settings {
    type Err = BusError;

    /// Parses the URL. Errors never contain the values of parameters, because a value may be a secret.
    fn from_str(text: &str) -> Result<Self, BusError> {
        const FORM: &str = "the URL of a Kafka bus is kafka://host:port[,host:port][?name=value&…]";
        let wrong = |what: String| BusError::Misconfigured(format!("{what}; {FORM}"));
        let rest = text.strip_prefix("kafka://").ok_or_else(|| wrong("the URL does not start with kafka://".into()))?;
        let (brokers, query) = rest.split_once('?').unwrap_or((rest, ""));
        if brokers.contains('@') {
            return Err(wrong(
                "the URL must not contain a user or a password before the host: use sasl.username and …".into(),
            ));
        }
        for (number, broker) in brokers.split(',').enumerate() {
            let port = broker.rsplit_once(':').filter(|(host, _)| !host.is_empty() && !host.contains(['/', ' ']));
            if !port.is_some_and(|(_, port)| port.parse::<u16>().is_ok_and(|port| port > 0)) {
                return Err(wrong(format!("broker {} is not host:port", number + 1)));
            }
        }
        let mut settings = Self::new(brokers);
        let mut names = HashSet::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) =
                pair.split_once('=').ok_or_else(|| wrong("a setting has no `=` and no value".into()))?;
            if !names.insert(name) {
                return Err(wrong(format!("the setting {name} is given twice")));
            }
            let value = percent_decode_str(value).decode_utf8();
            let value = value.map_err(|_| wrong(format!("the value of {name} is not UTF-8")))?;
            let number = |max: u64| {
                let number = value.parse::<u64>().ok().filter(|number| (1..=max).contains(number));
                number.ok_or_else(|| wrong(format!("{name} must be a number from 1 to {max}")))
            };
            settings = match name {
                "prefix" => settings.prefix(&value),
                "partitions" => settings.partitions(number(u64::from(PARTITIONS_MAX))? as u32),
                "replication" => settings.replication(number(u64::from(u16::MAX >> 1))? as u16),
                "retention.ms" => settings.retention(Duration::from_millis(number(i64::MAX as u64)?)),
                name => {
                    let (name, value) = match secret_of(name, &value) {
                        Some((name, secret)) => (name, secret.map_err(|reason| wrong(format!("{name}: {reason}")))?),
                        None => (name, value.into_owned()),
                    };
                    if !is_known_to_client(name, &value) {
                        let unknown = annals::config::unknown_parameter(name, &PARAMETERS);
                        return Err(wrong(format!("{unknown}, and the settings of librdkafka")));
                    }
                    if settings.client.contains_key(name) {
                        return Err(wrong(format!("the setting {name} is given twice")));
                    }
                    settings.set(name, &value)
                }
            };
        }
        Ok(settings)
    }
}

/// Returns the name and the value of the setting to which `NAME_file=PATH` or `NAME_env=VARIABLE` refers.
fn secret_of<'n>(name: &'n str, place: &str) -> Option<(&'n str, Result<String, SecretError>)> {
    if let Some(name) = name.strip_suffix("_file") {
        return Some((name, secret::from_file(place)));
    }
    name.strip_suffix("_env").map(|name| (name, secret::from_env(place)))
}

/// Returns whether librdkafka has a setting with this name. An invalid value does not matter here, because librdkafka
/// reports it later.
fn is_known_to_client(name: &str, value: &str) -> bool {
    let set = ClientConfig::new().set(name, value).create_native_config();
    !matches!(set, Err(KafkaError::ClientConfig(UNKNOWN, ..)))
}

/// Reports an invalid setting without its value, because the value may be a secret under a misspelt name.
pub(crate) fn misconfigured(error: KafkaError) -> BusError {
    BusError::Misconfigured(match error {
        KafkaError::ClientConfig(_, reason, name, value) => {
            // The client's reason may repeat the value or, if the value is a list, one of its elements.
            let repeats = value.split(',').any(|part| !part.is_empty() && reason.contains(part));
            let reason = if repeats { "the client rejects the value" } else { &*reason };
            format!("Kafka client setting {name}: {reason}")
        }
        other => other.to_string(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_mistake_without_values() {
        for (text, reason) in [
            ("kafka:", "kafka://"),
            ("kafka://", "broker 1"),
            ("kafka://a:1,b", "broker 2"),
            ("kafka://a:0", "broker 1"),
            ("kafka://a:99999", "broker 1"),
            ("kafka://user:secret@a:1", "must not contain a user"),
            ("kafka://a:1?secret", "no `=`"),
            ("kafka://a:1?partitions=secret", "partitions must be"),
            ("kafka://a:1?replication=0", "replication must be"),
            ("kafka://a:1?client.id=%ffsecret", "not UTF-8"),
            ("kafka://a:1?Partitions=secret", "did you mean `partitions`"),
            ("kafka://a:1?sasl.pasword=secret", "did you mean `sasl.password`"),
            ("kafka://a:1?nonsense=secret", "`nonsense` is unknown"),
            ("kafka://a:1?partitions=3&partitions=4", "partitions is given twice"),
        ] {
            let error = text.parse::<Settings>().unwrap_err().to_string();
            assert!(error.contains(reason) && !error.contains("secret"), "{text}: {error}");
        }
    }

    #[test]
    fn settings_pass_through_except_those_that_ordering_needs() {
        let settings: Settings = "kafka://a:1?partitions=3&retention.ms=60000&sasl.password=p%26q".parse().unwrap();
        assert_eq!((settings.partitions, settings.retention), (3, Some(Duration::from_secs(60))));
        let config = settings.finish(settings.client(), &[("acks", "all")]).unwrap();
        assert_eq!((config.get("sasl.password"), config.get("acks")), (Some("p&q"), Some("all")));
        for name in BROKERS {
            let error = settings.clone().set(name, "elsewhere:1").finish(ClientConfig::new(), &[]).unwrap_err();
            assert!(error.to_string().contains("the brokers are already named: a:1"), "{error}");
        }
        let error = settings.set("acks", "1").finish(ClientConfig::new(), &[("acks", "all")]).unwrap_err();
        assert!(error.to_string().contains("acks must be all"), "{error}");
    }

    #[test]
    fn secret_is_read_from_a_file_or_the_environment() {
        let path = std::env::temp_dir().join(format!("annals-kafka-secret-{}", std::process::id()));
        std::fs::write(&path, "horse\n").unwrap();
        let settings: Settings = format!("kafka://a:1?sasl.password_file={}", path.display()).parse().unwrap();
        std::fs::remove_file(&path).unwrap();
        let config = settings.finish(settings.client(), &[]).unwrap();
        assert_eq!((config.get("sasl.password"), config.get("sasl.password_file")), (Some("horse"), None));
        assert!(
            !settings.without_secrets("horse is wrong").contains("horse") && !format!("{settings:?}").contains("horse")
        );
        let settings: Settings = "kafka://a:1?ssl.key.password_env=PATH".parse().unwrap();
        assert_eq!(
            settings.finish(settings.client(), &[]).unwrap().get("ssl.key.password"),
            std::env::var("PATH").ok().as_deref()
        );
        for (url, part) in [
            ("kafka://a:1?sasl.password_file=/none/secret", "sasl.password: /none/secret: No such file"),
            ("kafka://a:1?sasl.password_env=ANNALS_NO_SUCH", "environment variable ANNALS_NO_SUCH is not set"),
        ] {
            let error = url.parse::<Settings>().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn error_that_repeats_a_secret_is_not_shown() {
        let settings: Settings = "kafka://a:1?sasl.password=horse&sasl.mechanisms=PLAIN".parse().unwrap();
        assert_eq!(settings.without_secrets("PLAIN: no such user"), "PLAIN: no such user");
        assert!(!settings.without_secrets("PLAIN: shop:horse is wrong").contains("horse"));
    }

    #[test]
    fn every_codec_of_kafka_is_built_in() {
        for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
            let mut config = Settings::new("a:1").client();
            config.set("compression.type", codec);
            let built = config.create::<rdkafka::producer::BaseProducer>();
            assert!(built.is_ok(), "{codec}: {:?}", built.err());
        }
    }

    #[test]
    fn wrong_setting_is_named_without_its_value() {
        let mut config = Settings::new("a:1").client();
        config.set("sasl.pasword", "hidden");
        let error = config.create::<rdkafka::producer::BaseProducer>().err().unwrap();
        let error = misconfigured(error).to_string();
        assert!(error.contains("sasl.pasword") && !error.contains("hidden"), "{error}");
    }
}
