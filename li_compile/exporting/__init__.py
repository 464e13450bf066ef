"""Accelerated models without their compiler: ``li_compile.export`` writes a folder, ``li_compile.load`` runs it."""

from li_compile.exporting.building import export, export_report
from li_compile.exporting.inputs import family_inputs
from li_compile.exporting.report import ExportReport
from li_compile.exporting.running import Runner, load

__all__ = ["ExportReport", "Runner", "export", "export_report", "family_inputs", "load"]
