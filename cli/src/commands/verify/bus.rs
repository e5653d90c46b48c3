//! Compares the topics with the log. Every message that the log records as sent must be in the topics, unchanged. The
//! topics must not contain any other message under the name of this log.
//!
//! Expected and found messages are sorted together in temporary files. Memory use does not grow with their number.
//! Repeated messages, and the messages of different lanes and partitions, may come in any order.

mod diff;
mod topics;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use annals::{
    LogQuery, Recorded,
    checkpoint::CHECKPOINTS,
    pages,
    parking::Parked,
    relay::{LogNames, RelayProgress, Routes},
};
use annals_kafka::{KafkaBus, Settings};
use clap::Args;
use futures::TryStreamExt;

pub(super) use self::diff::TopicCounts;
use self::{
    diff::{ExpectedMessage, TopicDiff},
    topics::Topics,
};
use super::{event::place, faults::Faults};
use crate::{failure::Failure, progress, stop::Stop, store::Store};

/// The Kafka to check, and the messages that are expected there.
#[derive(Clone, Debug, Args)]
pub(super) struct BusArgs {
    /// Also compare the topics of this Kafka with the log: `kafka://host:port[,host:port][?name=value&…]`. Any value
    /// can come from a file or from the environment: `?sasl.password_file=PATH`, `?sasl.password_env=VARIABLE`.
    #[arg(long, value_name = "URL")]
    pub bus: Option<Settings>,
    /// The categories that a service publishes [default: the categories of the events in its topic].
    #[arg(long, value_name = "SERVICE=CATEGORY,…", requires = "bus", value_parser = published)]
    publish: Vec<Published>,
}

#[derive(Clone, Debug)]
struct Published {
    service: String,
    categories: Vec<String>,
}

fn published(text: &str) -> Result<Published, String> {
    let named = text.split_once('=').filter(|(service, categories)| !service.is_empty() && !categories.is_empty());
    let (service, categories) = named.ok_or("write SERVICE=CATEGORY,CATEGORY, such as order=order,return")?;
    let categories = categories.split(',').map(str::to_owned).collect();
    Ok(Published { service: service.to_owned(), categories })
}

/// What the relays of a store have sent so far.
struct RelayState {
    services: BTreeMap<String, RelayProgress>,
    /// The service that sends messages of each category: events of services, commands of sagas, and replies of steps.
    senders: HashMap<String, String>,
    /// The position of the first event that is parked or waits behind a parked event, by service and stream.
    parked: HashMap<String, HashMap<String, i64>>,
}

/// Compares all topics of the store's relays.
pub(super) async fn verify(
    arguments: &BusArgs,
    settings: &Settings,
    store: &Store,
    faults: &mut Faults<'_>,
    stop: &Stop,
) -> Result<TopicCounts, Failure> {
    let archive = store.port();
    // Reads the progress of the relays first, so that every message that was sent before is in the topics when the
    // topics are read.
    let mut relays = RelayState::on(store).await?;
    if relays.services.is_empty() {
        return Err(Failure::new("no relay has run on this store: there are no topics to compare"));
    }
    let bus = KafkaBus::connect(settings.clone()).await?;
    let mut topics = Topics::of(bus);
    let mut diff = TopicDiff::new()?;
    for published in &arguments.publish {
        if !relays.services.contains_key(&published.service) {
            let known: Vec<_> = relays.services.keys().cloned().collect();
            return Err(Failure::new(format!(
                "no relay of service {} has run on this store; known services: {}",
                published.service,
                known.join(", ")
            )));
        }
        let senders = published.categories.iter().map(|category| (category.clone(), published.service.clone()));
        relays.senders.extend(senders);
    }
    let services: Vec<String> = relays.services.keys().cloned().collect();
    for service in &services {
        let named = arguments.publish.iter().any(|published| published.service == *service);
        let topic = topics.open(&format!("{service}.events")).await?;
        let mut categories = BTreeSet::new();
        let read = topics.read(topic, &relays.services, i64::MAX, |message, partition, offset| {
            if *message.source == **service {
                let stream = annals::StreamId::from_stored(&message.subject);
                categories.insert(stream.category().to_owned());
            }
            diff.found(message, topic, partition, offset)
        });
        read.await?;
        if !named {
            relays.senders.extend(categories.into_iter().map(|category| (category, service.clone())));
        }
        topics.open(&format!("{service}.commands")).await?;
    }
    let head = archive.status().await?.head.0;
    let bar = progress::bar("expected", head.unsigned_abs(), stop);
    let mut log = store.log(LogQuery::all(), 1..=head).await?;
    while let Some(event) = log.try_next().await? {
        relays.expect(&event, &mut topics, &mut diff, faults).await?;
        bar.set_position(event.position.0.unsigned_abs());
    }
    bar.finish_and_clear();
    for topic in topics.unread() {
        let read = topics.read(topic, &relays.services, head, |message, partition, offset| {
            diff.found(message, topic, partition, offset)
        });
        read.await?;
    }
    let names = LogNames::of(&*archive).await?;
    diff.compare(&topics, &names, &*archive, faults).await
}

impl RelayState {
    async fn on(store: &Store) -> Result<Self, Failure> {
        let archive = store.port();
        let services = RelayProgress::on(&*archive).await?;
        let mut senders: HashMap<String, String> =
            services.keys().map(|service| (format!("step.{service}"), service.clone())).collect();
        let mut checkpoints = pages::collection(&*archive, CHECKPOINTS, "");
        // The service that starts a saga sends the saga's commands. If one service's name is a prefix of another's, the
        // longer matching name is the right one.
        while let Some(document) = checkpoints.try_next().await? {
            let name = document.key.id.rsplit_once('/').and_then(|(name, _)| name.strip_suffix(".start"));
            let of_service = |service: &&String| name.is_some_and(|name| name.starts_with(&format!("{service}.")));
            if let Some((name, service)) =
                name.zip(services.keys().filter(of_service).max_by_key(|service| service.len()))
            {
                senders.insert(format!("saga.{}", &name[service.len() + 1..]), service.clone());
            }
        }
        let mut parked: HashMap<String, HashMap<String, i64>> = HashMap::new();
        for service in services.keys() {
            let collection = format!("parked.{service}.relay");
            let mut documents = pages::collection(&*archive, &collection, "");
            while let Some(document) = documents.try_next().await? {
                let waits: Parked = serde_json::from_str(&document.body)?;
                let streams = parked.entry(service.clone()).or_default();
                let first = streams.entry(waits.key.to_string()).or_insert(waits.position);
                *first = waits.position.min(*first);
            }
        }
        Ok(Self { services, senders, parked })
    }

    async fn expect(
        &self,
        event: &Recorded,
        topics: &mut Topics,
        diff: &mut TopicDiff,
        faults: &mut Faults<'_>,
    ) -> Result<(), Failure> {
        let Some(service) = self.senders.get(event.stream.category()) else { return Ok(()) };
        let Some(relayed) = self.services.get(service) else { return Ok(()) };
        let messages = match Routes::of(service).messages(event) {
            Ok(messages) => messages,
            Err(error) => {
                return faults.add(place(event), format!("the event cannot become a message: {}", error.source));
            }
        };
        let waits = self.parked.get(service).and_then(|streams| streams.get(event.stream.as_str()));
        let position = event.position.0;
        let required = event.position <= relayed.up_to(&event.stream) && waits.is_none_or(|first| position < *first);
        let lane = relayed.label(&event.stream, event.position);
        for (index, outgoing) in messages.iter().enumerate() {
            let topic = topics.open(&outgoing.topic).await?;
            let partition = topics.partition_of(topic, &outgoing.message.key);
            let expected = ExpectedMessage { topic, partition, index: index as i64, required };
            diff.expect(&outgoing.message, &lane, expected)?;
        }
        Ok(())
    }
}
