//! Publishes messages to a topic, in the form in which a service's relay sends them. Many messages are in flight at a
//! time. The replay ends when the brokers have acknowledged all messages.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use annals::{
    BusError, Publisher, Recorded, StreamId,
    bus::{Outgoing, Receipt},
    relay::{RelayProgress, Routes},
};
use annals_kafka::{KafkaBus, Settings};
use futures::FutureExt;

use super::arguments::ReplayArgs;
use crate::{failure::Failure, store::Store};

/// The number of messages that are published at once.
const PAGE: usize = 500;
/// The maximum number of pages that are published but not yet acknowledged.
const PAGES_IN_FLIGHT: usize = 16;
/// The maximum number of consecutive retries while the bus fails.
const ATTEMPTS_MAX: u32 = 10;
/// The delay grows by this much with each retry.
const PAUSE: Duration = Duration::from_millis(200);
/// How long messages in flight may take to arrive after the replay was stopped.
const LAST_RECEIPTS: Duration = Duration::from_secs(5);

/// Messages of consecutive events of the log.
struct Page {
    messages: Vec<Outgoing>,
    /// `None` before the page is published, and after publishing failed.
    receipt: Option<Receipt>,
}

/// The topic to which the messages are sent.
pub(super) struct TopicTarget {
    bus: KafkaBus,
    routes: Routes,
    name: Arc<str>,
    /// The relay's progress, if the topic is the service's own topic.
    relayed: Option<RelayProgress>,
    page_max: usize,
    next: Vec<Outgoing>,
    pages: VecDeque<Page>,
    attempts: u32,
}

impl TopicTarget {
    pub async fn open(settings: &Settings, arguments: &ReplayArgs, store: &Store) -> Result<Self, Failure> {
        let service = arguments.service.as_deref().unwrap_or_default();
        let own = format!("{service}.events");
        let name = arguments.topic.as_deref().unwrap_or(&own);
        let categories = &arguments.filter.category;
        let streams = arguments.stream.iter().map(|stream| StreamId::from_stored(stream));
        let of_streams: Vec<_> = streams.map(|stream| stream.category().to_owned()).collect();
        if categories.is_empty() && of_streams.is_empty() {
            return Err(Failure::new(format!(
                "name the categories that {service} publishes, with --category: the store may also hold events of other services"
            )));
        }
        if let Some(internal) = categories.iter().chain(&of_streams).find(|category| is_internal(category)) {
            return Err(Failure::new(format!(
                "category {internal} holds commands, replies or actions of operators, which are not replayed: their effects would \
                 happen again. To make the relay send them again, use `subscription {service}.relay reset`"
            )));
        }
        let relayed = match name == own {
            true => RelayProgress::on(&*store.port()).await?.remove(service),
            false => None,
        };
        if name == own && relayed.is_none() {
            return Err(Failure::new(format!(
                "no relay of service {service} has run on this store, so {own} holds none of its messages: name another \
                 service, or another topic with --topic"
            )));
        }
        let bus = KafkaBus::connect(settings.clone()).await?;
        // With pauses between events, a message must not wait until its page is full.
        let page_max = if arguments.speed.is_some() { 1 } else { PAGE };
        Ok(Self {
            bus,
            routes: Routes::of(service),
            name: name.into(),
            relayed,
            page_max,
            next: Vec::new(),
            pages: VecDeque::new(),
            attempts: 0,
        })
    }

    /// The position up to which the relay has sent everything, if the topic is the service's own topic. If the replay
    /// sent messages that the relay has not sent yet, consumers would believe that they have seen all earlier messages.
    pub fn sent(&self) -> Option<i64> {
        self.relayed.as_ref().map(|relayed| relayed.all_up_to().0)
    }

    pub async fn take(&mut self, event: &Arc<Recorded>) -> Result<(), Failure> {
        let made = self.routes.messages(event);
        for mut outgoing in
            made.map_err(|error| Failure::new(format!("position {}: {}", event.position, error.source)))?
        {
            outgoing.topic = self.name.clone();
            outgoing.message.lane = self.relayed.as_ref().map(|relayed| relayed.label(&event.stream, event.position));
            self.next.push(outgoing);
        }
        if self.next.len() < self.page_max {
            return Ok(());
        }
        self.turn();
        self.publish(PAGES_IN_FLIGHT * PAGE / self.page_max).await
    }

    pub async fn commit(&mut self) -> Result<(), Failure> {
        self.turn();
        self.publish(0).await
    }

    pub async fn give_up(&mut self) {
        let arrive = async {
            while let Some(receipt) = self.pages.front_mut().and_then(|page| page.receipt.as_mut()) {
                if receipt.await.is_err() {
                    return;
                }
                self.pages.pop_front();
            }
        };
        _ = tokio::time::timeout(LAST_RECEIPTS, arrive).await;
    }

    /// The events that the brokers have not acknowledged: the position before the first of these events, and their
    /// number.
    pub fn unacknowledged(&self) -> Option<(i64, i64)> {
        let mut messages = self.pages.iter().flat_map(|page| &page.messages).chain(&self.next);
        let first = messages.next()?;
        Some((first.message.position.0 - 1, 1 + messages.count() as i64))
    }

    fn turn(&mut self) {
        if !self.next.is_empty() {
            self.pages.push_back(Page { messages: std::mem::take(&mut self.next), receipt: None });
        }
    }

    /// Publishes all pages, and waits until at most `open_max` are unacknowledged.
    async fn publish(&mut self, open_max: usize) -> Result<(), Failure> {
        loop {
            // Publishes in order: first the page that failed, then all pages after it.
            if let Some(page) = self.pages.iter_mut().find(|page| page.receipt.is_none()) {
                match self.bus.publish(page.messages.clone()).await {
                    Ok(receipt) => page.receipt = Some(receipt),
                    Err(error) => {
                        let messages = page.messages.clone();
                        self.trouble(&messages, error).await?;
                    }
                }
                continue;
            }
            let Some(receipt) = self.pages.front_mut().and_then(|page| page.receipt.as_mut()) else { return Ok(()) };
            let came = match receipt.now_or_never() {
                Some(came) => came,
                None if self.pages.len() <= open_max => return Ok(()),
                None => match self.pages.front_mut().and_then(|page| page.receipt.as_mut()) {
                    Some(receipt) => receipt.await,
                    None => return Ok(()),
                },
            };
            match came {
                Ok(()) => {
                    self.attempts = 0;
                    self.pages.pop_front();
                }
                Err(error) => {
                    let messages = self.pages.front().map(|page| page.messages.clone()).unwrap_or_default();
                    self.trouble(&messages, error).await?;
                }
            }
        }
    }

    async fn trouble(&mut self, messages: &[Outgoing], error: BusError) -> Result<(), Failure> {
        if let BusError::Refused { index, reason } = &error
            && let Some(outgoing) = messages.get(*index)
        {
            let position = outgoing.message.position;
            return Err(Failure::new(format!(
                "topic {} rejected the message of position {position}: {reason}",
                self.name
            )));
        }
        self.attempts += 1;
        if matches!(error, BusError::Misconfigured(_)) || self.attempts > ATTEMPTS_MAX {
            return Err(error.into());
        }
        // All pages count as failed, so that they are published again in order.
        self.pages.iter_mut().for_each(|page| page.receipt = None);
        tokio::time::sleep(PAUSE * self.attempts).await;
        Ok(())
    }
}

/// Returns whether the category belongs to the engine rather than to a service.
fn is_internal(category: &str) -> bool {
    category.starts_with("saga.") || category.starts_with("step.") || category == annals::operator::CATEGORY
}
