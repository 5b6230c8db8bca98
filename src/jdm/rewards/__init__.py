"""Rewards: how good a picture is for its prompt; and judges, which check runs trained on a reward."""

from jdm.rewards.base import Reward, checked_reward, load_reward, reward_name
from jdm.rewards.classifier import PromptClassifier

__all__ = ["PromptClassifier", "Reward", "checked_reward", "load_reward", "reward_name"]
