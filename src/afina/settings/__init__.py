"""Every setting of every command, declared once: a YAML key, a flag and a Python argument.

One module per command; a field's description is its help text. An unknown name is an error that
names the nearest known one. No module of the package imports torch, so `afina --help` is quick.
"""

from afina.settings.advise import AdviseSettings, Goal
from afina.settings.annotate import AnnotateSettings
from afina.settings.audit import AuditSettings
from afina.settings.bench_serve import BenchServeSettings
from afina.settings.chat import ChatSettings
from afina.settings.combine import CombineSettings
from afina.settings.common import EMBEDDED, ModelSettings, Settings, job_settings, setting
from afina.settings.compare import VARIED, CompareSettings
from afina.settings.completion import CompletionSettings
from afina.settings.demo import DemoSettings
from afina.settings.doctor import DoctorSettings
from afina.settings.eval import EvalSettings
from afina.settings.export import ExportSettings
from afina.settings.extract import ExtractSettings
from afina.settings.generate import GenerateSettings
from afina.settings.groups import (
    GroupedSettings,
    MergeMethodSettings,
    MethodSettings,
    ObjectiveSettings,
    register_group,
    settings_groups,
)
from afina.settings.hub import PullSettings, PushSettings
from afina.settings.import_config import ImportSettings
from afina.settings.mcp import MCPSettings
from afina.settings.merge import MergedModelSettings, MergeSettings
from afina.settings.methods import LoRASettings, MoRASettings
from afina.settings.mitigate import MitigateSettings
from afina.settings.objectives import (
    OBJECTIVES,
    POLICIES,
    PREFERENCES,
    DPOSettings,
    GRPOSettings,
    KTOSettings,
    ORPOSettings,
    PolicySettings,
    PPOSettings,
    PreferenceSettings,
    RLOOSettings,
    SimPOSettings,
)
from afina.settings.parsing import AnySettings, as_settings, make_settings, read_yaml, resolved
from afina.settings.plan import PlanSettings
from afina.settings.registry import Registry
from afina.settings.revoke import RevokeSettings
from afina.settings.runs import RunsSettings
from afina.settings.serve import ServeSettings
from afina.settings.show import ShowSettings
from afina.settings.sign import SignSettings, VerifySettings
from afina.settings.train import TrainSettings

__all__ = [
    "EMBEDDED",
    "OBJECTIVES",
    "POLICIES",
    "PREFERENCES",
    "VARIED",
    "AdviseSettings",
    "AnnotateSettings",
    "AnySettings",
    "AuditSettings",
    "BenchServeSettings",
    "ChatSettings",
    "CombineSettings",
    "CompareSettings",
    "CompletionSettings",
    "DPOSettings",
    "DemoSettings",
    "DoctorSettings",
    "EvalSettings",
    "ExportSettings",
    "ExtractSettings",
    "GRPOSettings",
    "GenerateSettings",
    "Goal",
    "GroupedSettings",
    "ImportSettings",
    "KTOSettings",
    "LoRASettings",
    "MCPSettings",
    "MergeMethodSettings",
    "MergeSettings",
    "MergedModelSettings",
    "MethodSettings",
    "MitigateSettings",
    "MoRASettings",
    "ModelSettings",
    "ORPOSettings",
    "ObjectiveSettings",
    "PPOSettings",
    "PlanSettings",
    "PolicySettings",
    "PreferenceSettings",
    "PullSettings",
    "PushSettings",
    "RLOOSettings",
    "Registry",
    "RevokeSettings",
    "RunsSettings",
    "ServeSettings",
    "Settings",
    "ShowSettings",
    "SignSettings",
    "SimPOSettings",
    "TrainSettings",
    "VerifySettings",
    "as_settings",
    "job_settings",
    "make_settings",
    "read_yaml",
    "register_group",
    "resolved",
    "setting",
    "settings_groups",
]
