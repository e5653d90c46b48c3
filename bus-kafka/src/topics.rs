//! Creates missing topics as the settings say, or reports why a topic cannot be created.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use annals::BusError;
use rdkafka::{
    ClientContext,
    admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _, ConsumerContext},
    error::{KafkaError, RDKafkaErrorCode},
    types::RDKafkaErrorCode as Code,
};

use crate::settings::{Settings, misconfigured};

/// How long a cluster may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The interval at which to check, while no broker answers, whether a broker has rejected the connection.
const LOOK: Duration = Duration::from_millis(500);
/// How long all brokers may take to learn of a new topic.
const SETTLED: Duration = Duration::from_secs(10);
/// An internal topic of Kafka. The round trip to a broker is measured with metadata requests for this topic, because
/// such a request has the same size on every cluster. The measurement also works if the caller may not see the topic.
const EXISTING: &str = "__consumer_offsets";
/// The default maximum message size of brokers, in bytes.
const MESSAGE_BYTES_DEFAULT: usize = 1_000_000;

/// Records why a broker rejects the connection.
#[derive(Default)]
struct AuthErrors {
    rejected: Mutex<Option<String>>,
}

impl ClientContext for AuthErrors {
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::warn!(%error, reason, "Kafka client");
        if let Some(code @ (Code::Authentication | Code::SSL)) = error.rdkafka_error_code() {
            *self.rejected.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("{code}: {reason}"));
        }
    }
}

impl ConsumerContext for AuthErrors {}

/// How long cached facts about a topic stay valid. An operator may give the topic more partitions, or let it accept
/// larger messages.
const BELIEVED: Duration = Duration::from_secs(300);

/// The cached facts about a topic.
#[derive(Clone, Copy)]
pub(crate) struct Known {
    /// The largest message that the topic accepts, in bytes.
    pub bytes_max: usize,
    /// The number of partitions.
    pub partitions: u32,
    at: Instant,
}

/// The topics that are known to exist.
pub(crate) struct Topics {
    settings: Settings,
    admin: AdminClient<DefaultClientContext>,
    /// The client that looks up topics. The client is a consumer, because a lookup by the admin client would make
    /// brokers create a missing topic.
    probe: Arc<BaseConsumer<AuthErrors>>,
    known: Mutex<HashMap<Arc<str>, Known>>,
}

impl Topics {
    pub fn new(settings: &Settings) -> Result<Self, BusError> {
        let admin = settings.finish(settings.client(), &[])?.create().map_err(misconfigured)?;
        let probe = settings.finish(settings.consumer(), &[])?.create_with_context(AuthErrors::default());
        let probe: BaseConsumer<AuthErrors> = probe.map_err(misconfigured)?;
        Ok(Self { settings: settings.clone(), admin, probe: Arc::new(probe), known: Mutex::default() })
    }

    /// Returns the id of the cluster.
    pub async fn cluster(&self) -> Result<Arc<str>, BusError> {
        let probe = self.probe.clone();
        let asked = tokio::task::spawn_blocking(move || {
            for _ in 0..PATIENCE.as_millis() / LOOK.as_millis() {
                if let Some(cluster) = probe.client().fetch_cluster_id(LOOK) {
                    return Ok(cluster);
                }
                // Errors reach the context only while the client is polled.
                while probe.poll(Duration::ZERO).is_some() {}
                if let Some(reason) = probe.context().rejected.lock().unwrap_or_else(PoisonError::into_inner).take() {
                    return Err(Some(reason));
                }
            }
            Err(None)
        });
        match asked.await.map_err(|error| BusError::Unavailable(error.to_string()))? {
            Ok(cluster) => Ok(cluster.into()),
            Err(Some(reason)) => {
                let reason = self.settings.without_secrets(&reason);
                Err(BusError::Misconfigured(format!("authentication failed at {}: {reason}", self.settings)))
            }
            Err(None) => {
                let seconds = PATIENCE.as_secs();
                Err(BusError::Unavailable(format!("no broker of {} answered within {seconds} s", self.settings)))
            }
        }
    }

    /// Returns the duration of a request to a broker. Measures two requests and returns the shorter duration, because a
    /// busy machine delays some requests.
    pub async fn round_trip(&self) -> Result<Duration, BusError> {
        let probe = self.probe.clone();
        let measured = tokio::task::spawn_blocking(move || {
            let request = |_| {
                let asked_at = Instant::now();
                probe.fetch_metadata(Some(EXISTING), PATIENCE).map(|_| asked_at.elapsed())
            };
            (0..2).map(request).collect::<Result<Vec<_>, KafkaError>>()
        });
        let measured = measured.await.map_err(|error| BusError::Unavailable(error.to_string()))?;
        let measured = measured.map_err(|error| BusError::Unavailable(format!("measuring the round trip: {error}")))?;
        Ok(measured.into_iter().min().unwrap_or_default())
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<Arc<str>, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Clears the cache, because topics may have been deleted.
    pub fn forget(&self) {
        self.known().clear();
    }

    /// Creates the topic unless it exists.
    pub async fn ensure(&self, topic: &Arc<str>) -> Result<Known, BusError> {
        if let Some(known) = self.known().get(topic).filter(|known| known.at.elapsed() < BELIEVED) {
            return Ok(*known);
        }
        let partitions = match self.partitions(topic).await? {
            Some(partitions) => partitions,
            None => self.create(topic).await?,
        };
        let known = Known { bytes_max: self.message_bytes_max(topic).await, partitions, at: Instant::now() };
        self.known().insert(topic.clone(), known);
        Ok(known)
    }

    /// Returns the largest message that the topic accepts at present, in bytes.
    pub async fn look_again(&self, topic: &Arc<str>) -> usize {
        let bytes_max = self.message_bytes_max(topic).await;
        if let Some(known) = self.known().get_mut(topic) {
            known.bytes_max = bytes_max;
        }
        bytes_max
    }

    /// Returns whether the topic exists. Does not create the topic.
    pub async fn exists(&self, topic: &Arc<str>) -> Result<bool, BusError> {
        Ok(self.partitions(topic).await?.is_some())
    }

    /// Returns the number of partitions if the topic exists. Does not create the topic.
    async fn partitions(&self, topic: &Arc<str>) -> Result<Option<u32>, BusError> {
        let probe = self.probe.clone();
        let topic = topic.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let metadata = probe.fetch_metadata(Some(&topic), PATIENCE);
            metadata.map(|metadata| match metadata.topics() {
                [found] => match found.error().map(Code::from) {
                    None => Ok(u32::try_from(found.partitions().len()).ok().filter(|count| *count > 0)),
                    Some(Code::UnknownTopicOrPartition) => Ok(None),
                    Some(error @ Code::LeaderNotAvailable) => {
                        let reason = format!("topic {topic}: {error}");
                        // The topic is being created, and its partitions are not known yet.
                        match found.partitions().len() {
                            0 => Err(BusError::Unavailable(reason)),
                            count => Ok(u32::try_from(count).ok()),
                        }
                    }
                    Some(Code::InvalidTopic) => {
                        Err(BusError::Misconfigured(format!("{topic:?} is not a valid topic name")))
                    }
                    Some(Code::TopicAuthorizationFailed) => {
                        Err(BusError::Misconfigured(format!("authorization failed for topic {topic}: check its ACLs")))
                    }
                    Some(error) => Err(BusError::Unavailable(format!("topic {topic}: {error}"))),
                },
                _ => Ok(None),
            })
        });
        let looked = looked.await.map_err(|error| BusError::Unavailable(error.to_string()))?;
        looked.map_err(|error| BusError::Unavailable(format!("looking up the topic: {error}")))?
    }

    /// Returns the names of all topics that the caller may see, except the cluster's internal topics.
    pub async fn names(&self) -> Result<Vec<String>, BusError> {
        let probe = self.probe.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let metadata = probe.fetch_metadata(None, PATIENCE)?;
            let names = metadata.topics().iter().map(|topic| topic.name().to_owned());
            Ok::<_, KafkaError>(names.filter(|name| !name.starts_with("__")).collect())
        });
        let looked = looked.await.map_err(|error| BusError::Unavailable(error.to_string()))?;
        looked.map_err(|error| BusError::Unavailable(format!("listing topics: {error}")))
    }

    async fn create(&self, topic: &Arc<str>) -> Result<u32, BusError> {
        let Settings { partitions, replication, retention, .. } = &self.settings;
        // -1 means the cluster's default.
        let replication = TopicReplication::Fixed(replication.map_or(-1, i32::from));
        let mut new = NewTopic::new(topic, *partitions as i32, replication);
        let retention_ms = retention.map(|retention| retention.as_millis().to_string());
        if let Some(retention_ms) = &retention_ms {
            new = new.set("retention.ms", retention_ms);
        }
        let options = AdminOptions::new().request_timeout(Some(PATIENCE)).operation_timeout(Some(PATIENCE));
        let made = self.admin.create_topics([&new], &options).await;
        let made = made.map_err(|error| BusError::Unavailable(format!("creating topic {topic}: {error}")))?;
        match made.into_iter().next() {
            Some(Ok(_)) => tracing::info!(%topic, partitions, "topic made"),
            Some(Err((_, RDKafkaErrorCode::TopicAlreadyExists))) => {}
            Some(Err((_, error @ (Code::RequestTimedOut | Code::NotController | Code::OperationTimedOut)))) => {
                return Err(BusError::Unavailable(format!("creating topic {topic}: {error}")));
            }
            Some(Err((_, error))) => {
                let replication = self.settings.replication.map_or("as usual".to_owned(), |count| count.to_string());
                let wanted = format!("{partitions} partitions, replication {replication}");
                let reason =
                    format!("the cluster did not create topic {topic} ({wanted}): {error}; create the topic by hand");
                return Err(BusError::Misconfigured(reason));
            }
            None => return Err(BusError::Unavailable(format!("creating topic {topic}: no answer"))),
        }
        let settled = async {
            loop {
                if let Ok(Some(partitions)) = self.partitions(topic).await {
                    return partitions;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let settled = tokio::time::timeout(SETTLED, settled).await;
        settled.map_err(|_| BusError::Unavailable(format!("topic {topic} was created but is not visible yet")))
    }

    /// Returns the topic's maximum message size, or the default if the caller may not read the topic's settings.
    async fn message_bytes_max(&self, topic: &str) -> usize {
        let of_topic = self.setting(topic, "max.message.bytes").await.and_then(|bytes| bytes.parse().ok());
        of_topic.unwrap_or(MESSAGE_BYTES_DEFAULT)
    }

    /// Returns whether the topic is compacted: brokers then remove all but the last message of each key. Returns
    /// `false` if the caller may not read the topic's settings.
    pub async fn is_compacted(&self, topic: &str) -> bool {
        self.setting(topic, "cleanup.policy").await.is_some_and(|policy| policy.contains("compact"))
    }

    async fn setting(&self, topic: &str, name: &str) -> Option<String> {
        let options = AdminOptions::new().request_timeout(Some(PATIENCE));
        let described = self.admin.describe_configs([&ResourceSpecifier::Topic(topic)], &options).await;
        let described = described.ok()?.into_iter().next()?.ok()?;
        described.get(name)?.value.clone()
    }
}
